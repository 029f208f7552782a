"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");
  const select = (query, root = document) => root.querySelector(query);
  const all = (query, root = document) => [...root.querySelectorAll(query)];

  function make(name, attributes = {}, parent = null, text = null) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== null) node.textContent = text;
    if (parent) parent.append(node);
    return node;
  }

  function element(name, className = "", text = "") {
    const node = document.createElement(name);
    if (className) node.className = className;
    node.textContent = text;
    return node;
  }

  // Next to a point of the window, on whichever side has room.
  function showTip(title, lines, x, y) {
    // An open dialog covers everything outside it.
    const dialog = select("dialog[open]");
    (dialog || document.body).append(tip);
    tip.style.position = dialog ? "fixed" : "absolute";
    tip.replaceChildren(element("strong", "", title), lines.join("\n"));
    tip.hidden = false;
    const width = tip.offsetWidth, height = tip.offsetHeight, room = document.documentElement.clientWidth;
    const left = x + 14 + width > room ? Math.max(4, Math.min(x - 14 - width, room - width - 4)) : x + 14;
    const top = y - height - 12 < 0 ? y + 16 : y - height - 12;
    tip.style.left = `${Math.max(4, Math.min(left, room - width - 4)) + (dialog ? 0 : window.scrollX)}px`;
    tip.style.top = `${top + (dialog ? 0 : window.scrollY)}px`;
  }

  const hideTip = () => { tip.hidden = true; };

  // On a touch screen the tip stays until something else is touched.
  function onPointing(node, point, leave) {
    node.addEventListener("pointerdown", point);
    node.addEventListener("pointermove", point);
    node.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") leave(); });
  }
  document.addEventListener("pointerdown", (event) => { if (!event.target.closest(".chart, .picture")) hideTip(); });

  // Tables that sort ----------------------------------------------------------------------------------------------

  for (const table of all("table.sortable")) {
    const headers = all("thead th", table);
    headers.forEach((header, column) => select("button", header).addEventListener("click", () => {
      const isNumber = header.classList.contains("number");
      const before = header.getAttribute("aria-sort");
      const order = before ? (before === "ascending" ? "descending" : "ascending") : isNumber ? "descending" : "ascending";
      headers.forEach((other) => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const rows = all("tbody tr", table).map((row) => [row.children[column].dataset.sort, row]);
      rows.sort(([a], [b]) => {
        if (!isNumber) return sign * a.localeCompare(b, undefined, { numeric: true });
        // Undefined values come last in either order.
        if (a === "" || b === "") return (a === "") - (b === "");
        return sign * (Number(a) - Number(b));
      });
      select("tbody", table).append(...rows.map(([, row]) => row));
    }));
  }

  // Charts --------------------------------------------------------------------------------------------------------

  function ticks(low, high, count) {
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
    const values = [];
    for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-6; value += step) values.push(value);
    return { step, values };
  }

  function written(value, step) {
    if (step !== 0 && (step < 1e-4 || Math.abs(value) >= 1e6)) return value === 0 ? "0" : value.toExponential(0);
    if (step >= 1000 && value >= 10000) return `${value / 1000}k`;
    return value.toFixed(Math.max(0, -Math.floor(Math.log10(step) + 1e-9)));
  }

  // Draw lines into a figure, again whenever its width changes; return a function that draws other lines.
  // A line: { name, style, dashed, best, points: [[x, y, ...], ...] }; describe(point) returns the tip's lines.
  function chart(figure, { label, xLabel, yLabel, height, xRange, yRange, describe }) {
    let lines = [], at = null, width = 0, geometry = null;
    const svg = make("svg", { tabindex: 0, role: "slider", "aria-label": label, "aria-describedby": "curves-help", "aria-valuemin": 0, "aria-valuenow": 0, "aria-valuemax": 0 });
    figure.append(svg);

    function draw() {
      svg.replaceChildren();
      width = figure.clientWidth;
      const tall = Math.round(Math.min(height, Math.max(200, width * 0.75)));
      svg.setAttribute("height", tall);
      svg.setAttribute("viewBox", `0 0 ${width} ${tall}`);
      const points = lines.flatMap((line) => line.points);
      const [x0, x1] = xRange || [0, Math.max(...points.map((p) => p[0]), 1e-9)];
      const [y0, high] = yRange || [0, Math.max(...points.map((p) => p[1]), 1e-9)];
      const xTicks = ticks(x0, x1, width < 420 ? 4 : 5), yTicks = ticks(y0, high, 5);
      const y1 = yRange ? high : Math.ceil(high / yTicks.step - 1e-9) * yTicks.step;
      if (!yRange) yTicks.values = ticks(y0, y1, Math.round(y1 / yTicks.step)).values;
      const names = yTicks.values.map((value) => written(value, yTicks.step));
      const left = (yLabel ? 32 : 14) + 7 * Math.max(...names.map((name) => name.length)), right = 14, top = 10, bottom = 40;
      const x = (value) => left + (value - x0) / (x1 - x0) * (width - left - right);
      const y = (value) => tall - bottom - (value - y0) / (y1 - y0) * (tall - top - bottom);
      yTicks.values.forEach((value, i) => {
        make("line", { class: i ? "grid" : "axis", x1: left, x2: width - right, y1: y(value), y2: y(value) }, svg);
        make("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, svg, names[i]);
      });
      for (const value of xTicks.values) {
        make("line", { class: "axis", x1: x(value), x2: x(value), y1: tall - bottom, y2: tall - bottom + 4 }, svg);
        make("text", { x: x(value), y: tall - bottom + 18, "text-anchor": "middle" }, svg, written(value, xTicks.step));
      }
      make("text", { x: (left + width - right) / 2, y: tall - 5, "text-anchor": "middle" }, svg, xLabel);
      if (yLabel) make("text", { x: 12, y: (tall - bottom + top) / 2, "text-anchor": "middle", transform: `rotate(-90 12 ${(tall - bottom + top) / 2})` }, svg, yLabel);
      for (const line of lines) {
        const group = make("g", { class: line.style }, svg);
        const path = line.points.map((p, i) => `${i ? "L" : "M"}${x(p[0]).toFixed(1)} ${y(p[1]).toFixed(1)}`).join("");
        make("path", { class: `series${line.dashed ? " dashed" : ""}`, d: path }, group);
        if (line.points.length === 1) make("circle", { class: "mark", r: 3, cx: x(line.points[0][0]), cy: y(line.points[0][1]) }, group);
        if (line.best >= 0) make("circle", { class: "best", r: 4.5, cx: x(line.points[line.best][0]), cy: y(line.points[line.best][1]) }, group);
      }
      geometry = { x, y, mark: make("g", {}, svg) };
      if (at) place(at.line, at.index, false);
    }

    function place(line, index, withTip = true) {
      const points = lines[line].points;
      at = { line, index: Math.max(0, Math.min(index, points.length - 1)) };
      const point = points[at.index];
      const texts = describe(point);
      svg.setAttribute("aria-valuemax", points.length - 1);
      svg.setAttribute("aria-valuenow", at.index);
      svg.setAttribute("aria-valuetext", `${lines[line].name}: ${texts.join(", ")}`);
      geometry.mark.setAttribute("class", lines[line].style);
      geometry.mark.replaceChildren();
      make("circle", { class: "mark", r: 6, cx: geometry.x(point[0]), cy: geometry.y(point[1]) }, geometry.mark);
      if (!withTip) return;
      const frame = svg.getBoundingClientRect();
      showTip(lines[line].name, texts, frame.left + geometry.x(point[0]), frame.top + geometry.y(point[1]));
    }

    function leave() {
      hideTip();
      if (geometry) geometry.mark.replaceChildren();
    }

    function pointAtLine(event) {
      const frame = svg.getBoundingClientRect();
      const px = event.clientX - frame.left, py = event.clientY - frame.top;
      let nearest = null, least = Infinity;
      lines.forEach((line, l) => line.points.forEach((p, i) => {
        const distance = (geometry.x(p[0]) - px) ** 2 + (geometry.y(p[1]) - py) ** 2;
        if (distance < least) { least = distance; nearest = [l, i]; }
      }));
      if (nearest) place(...nearest);
    }

    onPointing(svg, pointAtLine, leave);
    svg.addEventListener("focus", () => {
      if (lines.length && svg.matches(":focus-visible")) at ? place(at.line, at.index) : place(0, Math.max(0, lines[0].best ?? 0));
    });
    svg.addEventListener("blur", leave);
    svg.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: 1, ArrowLeft: -1, PageUp: 10, PageDown: -10, Home: -Infinity, End: Infinity };
      const turns = { ArrowDown: 1, ArrowUp: -1 };
      if (event.key === "Escape") { leave(); return; }
      if (!lines.length || !(event.key in steps || event.key in turns)) return;
      event.preventDefault();
      const { line, index } = at || { line: 0, index: 0 };
      if (event.key in steps) { place(line, index + steps[event.key]); return; }
      const next = (line + turns[event.key] + lines.length) % lines.length;
      const here = lines[line].points[index][0];
      const distances = lines[next].points.map((p) => Math.abs(p[0] - here));
      place(next, distances.indexOf(Math.min(...distances)));
    });
    new ResizeObserver(() => { if (figure.clientWidth !== width) draw(); }).observe(figure);
    return (newLines) => {
      lines = newLines.filter((line) => line.points.length);
      at = null;
      hideTip();
      draw();
    };
  }

  for (const figure of all("figure[data-log]")) {
    const log = data.logs[Number(figure.dataset.log)];
    const isMetric = log.title.startsWith("AP");
    const show = chart(figure, {
      label: `${log.title} over steps`, xLabel: "step", yLabel: "", height: 240,
      describe: ([x, y]) => [`step ${x}`, `${log.title} ${isMetric ? y.toFixed(3) : Number(y.toPrecision(4))}`],
    });
    show(log.series.map((line) => ({ ...line, style: `s${line.run % 8}` })));
  }

  const curveClass = document.getElementById("curve-class"), curveIou = document.getElementById("curve-iou");
  const showCurves = chart(document.getElementById("curve-chart"), {
    label: "Precision over recall", xLabel: "recall", yLabel: "precision", height: 460, xRange: [0, 1], yRange: [0, 1],
    describe: ([recall, precision, score]) => [
      `score at least ${score.toFixed(3)}`, `precision ${precision.toFixed(3)}`, `recall ${recall.toFixed(3)}`,
      `F1 ${(precision + recall ? 2 * precision * recall / (precision + recall) : 0).toFixed(3)}`,
    ],
  });

  function updateCurves() {
    const iou = Number(curveIou.value);
    let lines;
    if (curveClass.value === "each") {
      const curves = data.curves[0][iou];
      lines = curves.map((curve, k) => ({ ...curve, name: data.classes[k], style: k ? `s${k - 1}` : "pooled", dashed: !k }));
      lines.push(lines.shift());
    } else {
      const k = Number(curveClass.value);
      lines = data.curves.map((run, r) => ({ ...run[iou][k], name: data.runs.length > 1 ? data.runs[r] : data.classes[k], style: `s${r % 8}` }));
    }
    showCurves(lines);
    document.getElementById("curve-legend").replaceChildren(...lines.map((line) => {
      const item = element("li"), swatch = element("span", `swatch ${line.style}`);
      swatch.setAttribute("aria-hidden", "true");
      const ap = line.ap < 0 ? "no boxes" : line.points.length ? `AP ${line.ap.toFixed(3)}` : "no detections";
      item.append(swatch, line.name, element("span", "value", ap));
      return item;
    }));
  }
  curveClass.addEventListener("change", updateCurves);
  curveIou.addEventListener("change", updateCurves);
  updateCurves();

  // Gallery -------------------------------------------------------------------------------------------------------

  const shots = all(".shot");
  if (!shots.length) return;
  const byId = (id) => document.getElementById(id);
  const runChoice = byId("filter-run"), classChoice = byId("filter-class"), kindChoice = byId("filter-kind");
  const score = byId("filter-score"), truth = byId("filter-truth");
  const drawn = shots.map((shot) => ({ shot, truths: all(".gt", shot), detections: all(".det", shot), costs: all(".cost", shot) }));
  const counted = (count, one, many = `${one}s`) => `${count} ${count === 1 ? one : many}`;

  function filter() {
    const run = runChoice ? runChoice.value : "0", ofClass = classChoice.value, kind = kindChoice.value, least = Number(score.value);
    byId("filter-score-value").textContent = least.toFixed(2);
    let numImages = 0, numDetections = 0, numLost = 0;
    for (const { shot, truths, detections, costs } of drawn) {
      let boxes = 0, lost = 0, wanted = 0;
      for (const box of detections) {
        const { r, c, s, k } = box.dataset;
        const isKind = kind === "" || k === kind || (kind === "errors" && k !== "hit" && k !== "uncounted");
        const hide = r !== run || (ofClass !== "0" && c !== ofClass) || !isKind || Number(s) < least;
        box.toggleAttribute("hidden", hide);
        if (!hide) boxes += 1;
      }
      for (const box of truths) {
        const { c, f, m } = box.dataset;
        const found = f.split(",")[run], isCounted = !box.classList.contains("uncounted");
        const isLost = isCounted && (found === "" || Number(found) < least);
        const isMissed = m.split(",")[run] === "1";
        const isClass = ofClass === "0" || c === ofClass;
        box.classList.toggle("lost", isLost);
        box.toggleAttribute("hidden", !truth.checked || !isClass || (kind === "missed" && !isMissed));
        if (isClass && isLost) lost += 1;
        if (isClass && (kind === "missed" ? isMissed : isLost && (kind === "" || kind === "errors"))) wanted += 1;
      }
      const hideShot = boxes + wanted === 0;
      shot.hidden = hideShot;
      costs.forEach((cost) => { cost.hidden = cost.dataset.r !== run; });
      if (hideShot) continue;
      numImages += 1;
      numDetections += boxes;
      numLost += kind === "missed" ? wanted : lost;
    }
    const lostText = kind === "missed" ? counted(numLost, "missed object") : `${counted(numLost, "object")} not found at this score`;
    byId("filter-count").textContent = `${numImages} of ${counted(shots.length, "image")}, ${counted(numDetections, "detection")}, ${lostText}`;
  }

  for (const control of [runChoice, classChoice, kindChoice, truth]) if (control) control.addEventListener("change", filter);
  score.addEventListener("input", filter);
  select(".filters").addEventListener("submit", (event) => event.preventDefault());
  filter();

  function describeBox(box) {
    const { c, s, k, i } = box.dataset;
    const name = data.classes[Number(c)];
    if (!box.classList.contains("det")) {
      const what = box.classList.contains("uncounted") ? "ignored object" : box.classList.contains("lost") ? "object, not found" : "object";
      return { what, name, score: "", iou: "" };
    }
    return { what: k, name, score: Number(s).toFixed(2), iou: i ? Number(i).toFixed(2) : "" };
  }

  // Describe the smallest visible box under the pointer.
  function pointAt(picture, event) {
    const frame = picture.getBoundingClientRect(), view = select("svg", picture).viewBox.baseVal;
    const x = (event.clientX - frame.left) / frame.width * view.width, y = (event.clientY - frame.top) / frame.height * view.height;
    let smallest = null, least = Infinity;
    for (const box of all(".gt:not([hidden]), .det:not([hidden])", picture)) {
      const { x: left, y: top, width, height } = box.firstElementChild;
      const w = width.baseVal.value, h = height.baseVal.value;
      const inside = x >= left.baseVal.value && x <= left.baseVal.value + w && y >= top.baseVal.value && y <= top.baseVal.value + h;
      if (inside && w * h < least) { least = w * h; smallest = box; }
    }
    all(".on", picture).forEach((box) => box.classList.remove("on"));
    if (!smallest) { hideTip(); return; }
    smallest.classList.add("on");
    const { what, name, score: s, iou } = describeBox(smallest);
    showTip(name, [what, ...(s ? [`score ${s}`] : []), ...(iou ? [`IoU ${iou} with the box concerned`] : [])], event.clientX, event.clientY);
  }

  function leavePicture(picture) {
    hideTip();
    all(".on", picture).forEach((box) => box.classList.remove("on"));
  }

  function watchBoxes(picture) {
    onPointing(picture, (event) => pointAt(picture, event), () => leavePicture(picture));
  }
  all(".shot .picture").forEach(watchBoxes);

  const dialog = byId("large");
  let current = null;

  function enlarge(shot) {
    current = shot;
    byId("large-title").textContent = select(".name", shot).textContent;
    byId("large-cost").textContent = select(".cost:not([hidden])", shot).textContent;
    const picture = select(".picture", shot).cloneNode(true), svg = select("svg", picture);
    all("g[hidden]", picture).forEach((box) => box.remove());
    const visible = all("g", picture);
    const { width, height } = svg.viewBox.baseVal;
    picture.style.maxWidth = `max(16rem, calc((100vh - 12rem) * ${width / height}))`;
    watchBoxes(picture);
    byId("large-picture").replaceChildren(picture);
    if (!dialog.open) dialog.showModal();
    const perPixel = width / picture.clientWidth;
    const labels = make("g", {}, svg);
    // On a phone names would cover the picture; touching a box shows its own.
    for (const box of picture.clientWidth < 500 ? [] : visible.filter((one) => one.classList.contains("det"))) {
      const { name, score: s } = describeBox(box), rect = box.firstElementChild;
      const x = Math.max(2 * perPixel, rect.x.baseVal.value), y = Math.max(12 * perPixel, rect.y.baseVal.value - 4 * perPixel);
      make("text", { class: `k-${box.dataset.k}`, x, y, "font-size": 12 * perPixel, "stroke-width": 3 * perPixel }, labels, `${name} ${s}`);
    }
    byId("large-rows").replaceChildren(...visible.map((box) => {
      const { what, name, score: s, iou } = describeBox(box), row = element("tr");
      row.append(element("td", "", what), element("td", "", name), element("td", "number", s), element("td", "number", iou));
      return row;
    }));
  }

  for (const shot of shots) select(".enlarge", shot).addEventListener("click", () => enlarge(shot));
  for (const button of all("[data-go]", dialog)) {
    button.addEventListener("click", () => {
      if (button.dataset.go === "0") { dialog.close(); return; }
      const visible = shots.filter((shot) => !shot.hidden);
      enlarge(visible[(visible.indexOf(current) + Number(button.dataset.go) + visible.length) % visible.length]);
    });
  }
  dialog.addEventListener("close", () => select(".enlarge", current).focus());
})();
