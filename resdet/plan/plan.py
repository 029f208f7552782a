"""Turn a configuration that leaves things open into one that states them: facts, rules, and a table of the reasons."""

from __future__ import annotations

import json
import logging
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from resdet.build import build_model
from resdet.config import Config, config_from_plain
from resdet.config_reading import config_to_plain, flattened
from resdet.data.dataset import DetectionDataset
from resdet.data.image_facts import default_num_workers
from resdet.files import write_text
from resdet.plan.fingerprint import fingerprint
from resdet.plan.machine import Machine, measure_machine
from resdet.plan.rules import REGIONS, RULES, Facts, num_regions
from resdet.processes import Processes
from resdet.training.folder import PLAN
from resdet.training.settings import fixed_steps

logger = logging.getLogger(__name__)

_START_S = 5.0  # of the workers, and of the first step


@dataclass(frozen=True)
class Row:
    """One line of a plan.

    Attributes:
        key: Dotted key of the configuration.
        value: Its value, plain.
        because: Why it has this value.
        is_stated: Whether it was stated by the user, and not chosen.
    """

    key: str
    value: Any
    because: str
    is_stated: bool = False


@dataclass(frozen=True)
class Plan:
    """A configuration that states everything, and why.

    Attributes:
        config: An ordinary configuration: ``plan`` is false in it.
        facts: What was found out of data and machine, lines of text.
        rows: One for each key that a rule has a choice for.
        seconds: What finding it out took.
    """

    config: Config
    facts: Sequence[str]
    rows: Sequence[Row]
    seconds: float

    def text(self) -> str:
        """Return facts and table as text."""
        lines = [*self.facts, "", f"{'key':32} {'value':24} because"]
        for row in self.rows:
            value = json.dumps(row.value)
            because = textwrap.wrap(f"you state it ({row.because})" if row.is_stated else row.because, 70)
            lines += [f"{row.key:32} {value:24} {because[0]}", *(" " * 58 + line for line in because[1:])]
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """Write the facts and the table into a run's folder, for its report."""
        plain = {"facts": list(self.facts), "rows": [asdict(row) for row in self.rows]}
        write_text(folder / PLAN, json.dumps(plain, indent=1))


def make_plan(
    config: Config, train_set: DetectionDataset, val_set: DetectionDataset, team: Processes, *, begun: float
) -> Plan:
    """Choose what a configuration does not state.

    Args:
        config: The configuration; what it states, in its file or by overrides, is left as it is.
        train_set: The training data, without augmentation.
        val_set: The validation data.
        team: The processes that will train; this one alone measures.
        begun: When the run began (``time.perf_counter``): its minutes count from then.
    """
    started = time.perf_counter()
    data = fingerprint(train_set, val_set.table)
    stated = stated_keys(config)
    # Regions cost time, and their number follows from the data alone.
    regions = config.model.box_batch_size_per_image if REGIONS in stated else num_regions(data)
    machine = _measured(config, regions, train_set, team.device)
    table, used = train_set.table, train_set.trained
    settled = flattened(config_to_plain(config))
    facts = Facts(
        data=data,
        machine=machine,
        boxes=table.boxes_in_image()[used],
        sizes=table.sizes[table.image_of_box()[used]].astype(np.float64),
        run_seconds=None if config.minutes is None else 60 * config.minutes,
        seconds=None,
        num_val_images=val_set.table.num_images,
        num_steps=None if config.minutes is not None else fixed_steps(config.train, data.num_images),
        num_workers=default_num_workers(),
        num_processes=team.world_size,
        settled=settled,
        stated=stated,
    )
    rows: list[Row] = []
    for rule in RULES:
        if config.minutes is not None:
            facts = replace(facts, seconds=_training_seconds(facts, 60 * config.minutes, time.perf_counter() - begun))
        for choice in rule(facts):
            is_stated = choice.key in stated
            rows.append(Row(choice.key, settled[choice.key] if is_stated else choice.value, choice.because, is_stated))
            if not is_stated:
                settled[choice.key] = choice.value
    chosen = {row.key: row.value for row in rows if not row.is_stated}
    planned = _with(config, chosen)
    return Plan(planned, [*data.lines(), _machine_line(machine, facts)], rows, time.perf_counter() - started)


def resumed_plan(config: Config, before: Config) -> Config:
    """Return the configuration of a planned run that goes on: its own, ``before``, with what is stated now."""
    plain = config_to_plain(config)
    now, stated = flattened(plain), stated_keys(config)
    values = {key: now[key] for key in stated if not key.startswith("data.")}
    if len(values) < len(stated):  # other data may be in another format, with other keys
        values["data"] = plain["data"]
    return _with(before, values)


def stated_keys(config: Config) -> set[str]:
    """Return the dotted keys that a configuration states."""
    return set(flattened(config.model_dump(mode="json", exclude_unset=True))) - {"plan"}


def _with(config: Config, values: Mapping[str, Any]) -> Config:
    """Return a configuration with these values in place of its own, which plans nothing."""
    tree = config_to_plain(config)
    for key, value in {**values, "plan": False}.items():
        node, (*sections, name) = tree, key.split(".")
        for section in sections:
            node = node[section]
        node[name] = value
    return config_from_plain(tree, source="the plan")


def _measured(config: Config, regions: int, train_set: DetectionDataset, device: torch.device) -> Machine:
    torch.manual_seed(config.seed)
    measured = config.model.model_copy(update={"box_batch_size_per_image": regions})
    model = build_model(measured, train_set, resume_from=None)
    return measure_machine(model, train_set, device)


def _training_seconds(facts: Facts, run_seconds: float, elapsed: float) -> float:
    """Return the time that is left for training steps when the last model is evaluated too."""
    return max(run_seconds - elapsed - _START_S - facts.evaluation_seconds, 0.1 * run_seconds)


def _machine_line(machine: Machine, facts: Facts) -> str:
    seconds = facts.image_seconds(facts.side)
    return (
        f"{machine.device}: {seconds:.3g} s to train on an image of this size, in {machine.precision}; room for "
        f"{machine.megapixels:.0f} megapixels in a step"
    )
