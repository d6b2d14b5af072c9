"""The README's steps with configs/own_data.py on two small tables of one's own."""

import json
import os
import random
from pathlib import Path

import pytest
from forked import Script

ROOT = Path(__file__).parents[2]
SPORTS, THINGS = ("Tennis", "Golf", "Ski", "Climbing"), ("shoes", "gloves", "bag", "socks", "cap")
pytestmark = pytest.mark.slow


@pytest.fixture
def tables(tmp_path):
    titles = [f"{sport} {thing}" for sport in SPORTS for thing in THINGS]
    items = [f"s{number},{title}" for number, title in enumerate(titles)]
    (tmp_path / "goods.csv").write_text("\n".join(["item,title", *items]))
    rows, draw = ["customer,item,timestamp"], random.Random(0)
    for user in range(30):
        chosen = draw.sample(range(len(titles)), 14)
        rows += [f"u{user},s{item},{1000 * user + at}" for at, item in enumerate(chosen)]
    (tmp_path / "sales.csv").write_text("\n".join(rows))
    settings = {
        "data.interactions": tmp_path / "sales.csv",
        "data.catalogue": tmp_path / "goods.csv",
        "data.user_column": "customer",
        "prompt.templates": r"('Sports goods one person bought, in order:\n{history}\n{target}',)",
        "training.buckets": "()",
    }
    return ",".join(f"{name}={value}" for name, value in settings.items())


def test_the_steps_of_the_readme(tables, tmp_path):
    workdir = f"--workdir={tmp_path}/run"

    def step(script, *flags):
        command = [f"{ROOT}/launch/{script}.py", workdir, *flags]
        done = Script(command, dict(os.environ)).completed()
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    config = f"--config={ROOT}/configs/own_data.py:debug,{tables}"
    step("prepare_data", config)
    step("train_cf", config)
    trained = step("train", config, "--run=aligned")
    assert "Movies" not in trained.stderr
    step("evaluate")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert any("aligned" in label for label in results["models"])
    lines = step("recommend", "--run=aligned", "--item=Golf bag", "--guidance=1", "--k=3").stdout
    assert [line.split()[0] for line in lines.splitlines()] == ["1", "2", "3"]
    refused = Script(
        [f"{ROOT}/launch/recommend.py", workdir, "--item=Golf bag", "--config.prompt.separator=Or"],
        dict(os.environ),
    ).completed()
    assert refused.returncode == 1
    assert "prompt.separator" in refused.stderr
    step("export", "--format=peft", f"--output={tmp_path}/exported")
    assert (tmp_path / "exported" / "adapter_config.json").is_file()
