"""The command that measures what the documentation claims."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks import WORK, run_benchmark
from benchmarks.coco_json import write_coco_json
from benchmarks.report import Report

from resdet.data.coco import read_coco
from resdet.errors import UserError

TOOL = Path(__file__).parents[1] / "tools" / "benchmark.py"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "work= must be one of .*annotations.*; got nothing"),
        (["work=sleep"], "work= must be one of .*; got 'sleep'"),
        (["annotations"], "settings are given as key=value, got 'annotations'"),
        (["work=annotations", "seed=1", "seed=2"], "seed is given twice: '1' and '2'"),
        (["work=annotations", "boxes=3"], "work=annotations has no setting 'boxes'; its settings are num_images, "),
        (["work=annotations", "num_boxes=many"], "num_boxes must be an integer, got 'many'"),
        (["work=annotations", "repeats=0"], "repeats must be 1 or more, got 0"),
        (["work=annotations", "start_methods=fork,thread"], "start_methods must be among fork, .*, got 'thread'"),
    ],
)
def test_wrong_settings_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        run_benchmark(arguments)


def test_figures_are_not_written_over_what_is_measured(tmp_path):
    path = tmp_path / "instances.json"
    path.write_text("{}")
    main = runpy.run_path(str(TOOL))["main"]
    with pytest.raises(UserError, match=r"instances\.json: the output would overwrite an input of this command"):
        main(["work=loading", f"annotations={path}", f"output={path}"])
    assert path.read_text() == "{}"


def test_settings_take_the_types_of_their_defaults(monkeypatch):
    def measure(
        *, number: int = 1, ratio: float = 1.0, warm: bool = False, where: Path = Path(), name: str = ""
    ) -> Report:
        return Report("fake", {"all": [number, ratio, warm, where, name]}, {})

    monkeypatch.setitem(WORK, "fake", measure)
    report = run_benchmark(["work=fake", "number=3", "ratio=.5", "warm=true", "where=a/b", "name=x=y"])
    assert report.settings["all"] == [3, 0.5, True, Path("a/b"), "x=y"]
    with pytest.raises(UserError, match="warm must be true or false, got 'yes'"):
        run_benchmark(["work=fake", "warm=yes"])
    with pytest.raises(UserError, match="ratio must be a number, got ''"):
        run_benchmark(["work=fake", "ratio="])


def test_a_report_is_a_table_and_json(tmp_path):
    rows = [{"what": "a", "seconds": 1234.5, "images": 1000}, {"what": "long", "seconds": 0.25, "images": 5}]
    report = Report("fake", {"n": 1}, {"Speed": rows})
    table, machine = str(report).split("\n\n")
    # Three digits of a column's smallest number.
    assert table == "Speed\n  what    seconds  images\n  a     1,234.500   1,000\n  long      0.250       5"
    assert machine.startswith(f"Measured on {report.machine['cpu']}")
    report.write(tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())
    assert (written["work"], written["settings"]) == ("fake", {"n": 1})
    assert written["tables"]["Speed"][1] == {"what": "long", "seconds": 0.25, "images": 5}
    assert {"torch", "numpy", "cores", "threads", "cpu"} <= set(written["machine"])


def test_numbers_are_laid_out_by_their_size():
    rows = [{"x": 0.0, "y": 123.4, "z": 1e-9}, {"x": 0.0, "y": 5000.0, "z": 2.0}]
    assert str(Report("fake", {}, {"T": rows})).split("\n\n")[0].splitlines()[2].split() == ["0.00", "123", "0.0000"]


def test_the_made_up_file_is_a_function_of_its_arguments_and_sound(tmp_path):
    paths = [tmp_path / f"{number}.json" for number in range(3)]
    for path, seed in zip(paths, (0, 0, 1), strict=True):
        write_coco_json(path, num_images=50, num_boxes=400, num_categories=9, seed=seed)
    assert paths[0].read_bytes() == paths[1].read_bytes() != paths[2].read_bytes()
    table = read_coco(paths[0])
    assert (table.num_images, table.num_boxes, len(table.categories)) == (50, 400, 9)
    assert table.trainable().sum() == 400 - table.crowd.sum() > 0
    annotations = json.loads(paths[0].read_text())["annotations"]
    polygons = [a["segmentation"] for a in annotations if not a["iscrowd"]]
    assert all(isinstance(polygon, list) and len(polygon[0]) >= 6 for polygon in polygons)
    assert {"counts", "size"} == set(next(a["segmentation"] for a in annotations if a["iscrowd"]))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_annotations_at_a_small_size(tmp_path):
    """Eight processes that import torch take a minute on one core; the figures at full size stand in the README."""
    settings = ["num_images=2000", "num_boxes=14000", "num_workers=2", "repeats=1", "start_methods=fork,spawn"]
    output = tmp_path / "report.json"
    run = subprocess.run(
        [sys.executable, str(TOOL), "work=annotations", *settings, f"output={output}"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    loading, memory = json.loads(output.read_text())["tables"].values()
    assert [row["what"] for row in loading] == ["pycocotools.COCO", "cold cache", "from cache"]
    assert loading[2]["CPU seconds"] < loading[1]["CPU seconds"] < loading[0]["CPU seconds"]
    assert [row["workers"] for row in memory] == ["2 by fork", "2 by spawn"]
    # The table is 1 MB; what else reading it leaves behind (json's and NumPy's buffers) is small too.
    assert all(abs(row[f"{when} [MB]"]) < 60 for row in memory for when in ("start", "middle", "end"))


def test_the_tool_tells_a_mistake_in_one_line():
    run = subprocess.run([sys.executable, str(TOOL), "work=sleep"], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("benchmark.py: work= must be one of")
    assert run.stderr.count("\n") == 1


@pytest.mark.slow
def test_processes_of_their_own_find_the_benchmarks_that_the_command_found(tmp_path):
    """Wherever the command is started, and whatever the environment says of paths."""
    program = (
        f"import sys; sys.path.insert(0, {str(TOOL.parent)!r})\n"
        "from benchmarks.own_process import in_own_process\n"
        "from benchmarks.timing import return_freed_memory\n"
        "import json; print(json.dumps(in_own_process(return_freed_memory)))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) in (True, False)
