"""How a launch script ends, and which log lines it shows."""

import logging
import os
from pathlib import Path

import jax
import pytest
from forked import Script

import tca4rec_jax
from tca4rec_jax.config import default_config
from tca4rec_jax.terminal import is_ours_or_a_warning
from tca4rec_jax.training.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
SCRIPT = """
import jax
import jax.numpy as jnp
from absl import logging
from tca4rec_jax.errors import UserError
from tca4rec_jax.launching import DEFINE_field, launch
from tca4rec_jax.ranges import Count, Share
from tca4rec_jax.reporting import show

K = DEFINE_field("k", Count, 10, "A number.")
SHARES = DEFINE_field("shares", tuple[Share, ...], "0,0.5", "Several.")

def run(config, workdir):
    {body}

launch(run, "script", config_of={config_of!r})
"""


def completed(tmp_path, body, *flags, config_of=None, environment=None):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(body=body, config_of=config_of))
    flags = flags or (f"--config={ROOT}/configs/quickstart.py", f"--workdir={tmp_path}/run")
    return Script([str(path), *flags], environment or dict(os.environ)).completed()


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("raise UserError('alpha is 2: give 0 to 1')", "script: alpha is 2: give 0 to 1"),
        ("raise FloatingPointError('step 3: the loss is nan')", "script: step 3: the loss is nan"),
        ("raise FileNotFoundError('no such run')", "script: no such run"),
        ("open(workdir / 'absent')", "No such file or directory"),
        (r"raise UserError('[/b]\x1b[2J is\nno id')", r"script: [/b]\x1b[2J is\nno id"),
    ],
)
def test_an_error_of_the_user_ends_in_one_line(tmp_path, body, line):
    done = completed(tmp_path, body)
    assert done.returncode == 1
    assert line in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_an_interrupt_ends_in_one_line(tmp_path):
    """Also where the tests are a job in the background, whose processes ignore the signal."""
    handled = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    body = f"import os, signal; {handled}; os.kill(os.getpid(), signal.SIGINT)"
    done = completed(tmp_path, body)
    assert (done.returncode, done.stderr) == (130, "script: interrupted\n")


def test_an_error_of_the_user_shows_its_traceback_if_asked(tmp_path):
    flags = f"--config={ROOT}/configs/quickstart.py", f"--workdir={tmp_path}", "--verbosity=1"
    done = completed(tmp_path, "raise UserError('for users')", *flags)
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("script: for users\n")


def test_flags_have_the_type_of_their_annotation(tmp_path):
    body = "print(K.value, SHARES.value)"
    assert completed(tmp_path, body).stdout == "10 [0.0, 0.5]\n"
    flags = f"--config={ROOT}/configs/quickstart.py", f"--workdir={tmp_path}", "--shares=1", "--k=2"
    assert completed(tmp_path, body, *flags).stdout == "2 [1.0]\n"


def trained_run(workdir, name, alpha):
    folder = RunFolder.of(workdir, name)
    (folder.checkpoints / "3").mkdir(parents=True)
    config = default_config()
    config.update(objective={"alpha": alpha}, mesh={"tensor": 7}, run=None)
    config.training.buckets = (8, 16)
    folder.config_path.write_text(config.to_json_best_effort())
    os.utime(folder.config_path, (alpha, alpha))
    return folder


def test_a_script_that_starts_from_a_run_takes_its_config(tmp_path):
    body = "print(config.run, config.objective.alpha, config.training.buckets, config.mesh.tensor)"
    workdir = f"--workdir={tmp_path}"
    refused = completed(tmp_path, body, workdir, config_of="run")
    assert "script: give a trained run with --run" in refused.stderr
    assert "has none yet" in refused.stderr
    trained_run(tmp_path, "old", 0.25)
    done = completed(tmp_path, body, workdir, config_of="run")
    assert (done.stdout, done.stderr) == ("old 0.25 (8, 16) 1\n", "")
    trained_run(tmp_path, "new", 0.5)
    refused = completed(tmp_path, body, workdir, config_of="run")
    assert refused.stderr.endswith(f"({tmp_path} has new, old), or a --config\n")
    refused = completed(tmp_path, body, workdir, "--run=other", config_of="any_run")
    assert refused.stderr.endswith(f"({tmp_path} has new, old), or a --config\n")
    change = "--config.training.buckets=(32,)"
    done = completed(tmp_path, body, workdir, "--run=old", change, config_of="run")
    assert done.stdout == "old 0.25 (32,) 1\n"
    assert completed(tmp_path, body, workdir, config_of="any_run").stdout.startswith("new 0.5")
    given = f"--config={ROOT}/configs/quickstart.py"
    done = completed(tmp_path, body, workdir, given, "--run=mine", config_of="run")
    assert done.stdout.startswith("mine 0.9")
    (tmp_path / "llm" / "old" / "config.json").write_text("{")
    damaged = completed(tmp_path, body, workdir, "--run=old", config_of="run")
    assert "config.json: not a readable JSON file" in damaged.stderr
    assert len(damaged.stderr.splitlines()) == 1


def test_the_prompt_of_movies_is_not_taken_for_own_data_unnoticed(tmp_path):
    flags = [f"--config={ROOT}/configs/quickstart.py", f"--workdir={tmp_path}"]
    assert completed(tmp_path, "pass", *flags).stderr == ""
    own = completed(tmp_path, "pass", *flags, "--config.data.source=files")
    assert "prompt.templates is ('Movies one person watched, in order:" in own.stderr
    flags[0] = f"--config={ROOT}/configs/own_data.py"
    assert completed(tmp_path, "pass", *flags).stderr == ""


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("raise ValueError('not for users')", "ValueError: not for users"),
        ("jnp.zeros(3).reshape(2, 2)", "in run"),
        ("raise OSError('of no file')", "OSError: of no file"),
    ],
)
def test_a_bug_shows_its_traceback(tmp_path, body, line):
    done = completed(tmp_path, body)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert line in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config=C:colour=red"], "config argument 'colour=red': expected 'debug' or"),
        (["--config=C", "--config.training.stepz=3"], "did you mean --config.training.steps?"),
        (["--config=C", "--config.trainig.steps=3"], "did you mean --config.training.steps?"),
        (["--config=C", "--config.steps=3"], "did you mean --config.training.steps?"),
        (["--config=C", "--config.colour", "red"], "there is no field --config.colour"),
        (["--config=C", "--config.training.steps=many"], "--config.training.steps=many"),
        (["--config=C", "--no_such_flag=1"], "Unknown command line flag 'no_such_flag'"),
        (["--config=absent.py"], "script: --config=absent.py: no such file"),
        ([], "script: give --config (--help says what for)"),
        (["--config=C", "stray"], "unexpected argument 'stray': give flags as --name=value"),
        (["--config=ROOT/configs/quikstart.py"], "did you mean ROOT/configs/quickstart.py?"),
        (["--config=C", "--workdir=gs://bucket/x"], "expected a local path, not a URL"),
        (["--config=C", "--k=0"], "flag --k=0: expected at least 1"),
        (["--config=C", "--k=many"], "flag --k=many: "),
        (["--config=C", "--shares=0,2"], "flag --shares=0,2: expected 0 to 1"),
    ],
)
def test_a_bad_flag_ends_in_one_line(tmp_path, flags, message):
    flags = [flag.replace("C", "ROOT/configs/quickstart.py") for flag in flags]
    flags = [flag.replace("ROOT", str(ROOT)) for flag in flags]
    message = message.replace("ROOT", str(ROOT))
    done = completed(tmp_path, "pass", "--workdir=x", *flags)
    assert done.returncode == 1
    assert done.stderr.startswith("script: ")
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("bug", ["1 + 'a'", "int('b')", "[].colour"])
def test_a_bug_of_a_config_file_shows_its_traceback(tmp_path, bug):
    path = tmp_path / "buggy.py"
    path.write_text(f"def get_config(arg=''):\n    return {bug}\n")
    done = completed(tmp_path, "pass", f"--config={path}", "--workdir=x")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert 'buggy.py", line 2, in get_config' in done.stderr


def test_help_lists_the_flags(tmp_path):
    done = completed(tmp_path, "pass", "--helpshort")
    assert "--[no]dry_run" in done.stdout
    assert "--workdir" in done.stdout


@pytest.mark.parametrize(
    ("script", "flags", "expected"),
    [
        ("prepare_data", [], ["reads MovieLens-100K, downloaded", "writes W/data"]),
        ("train_cf", [], ["reads W/data", "writes W/cf", "writes W/cf/logits"]),
        (
            "train",
            [],
            ["reads W/cf/logits", "reads smollm2-135m-instruct", "writes W/llm/alpha_0.3"],
        ),
        ("train", ["--config.prompt.item={id}"], ["reads W/ids/ids.json"]),
        ("evaluate", [], ["reads W/llm/plain", "reads W/llm/aligned", "writes W"]),
        ("evaluate", ["--config.evaluation.variants=()"], ["reads W/llm"]),
        (
            "evaluate",
            ["--runs=mine,untrained", "--name=bar"],
            ["reads W/llm/mine", "writes W/results/bar", "not llm/untrained", "not aligned"],
        ),
        ("sweep_guidance", ["--guidances=0,1"], ["reads W/llm/alpha_0.3", "writes W"]),
        (
            "sweep_guidance",
            ["--untrained", "--name=bar"],
            ["not llm/alpha", "writes W/results/bar"],
        ),
        ("explain", ["--untrained"], ["reads W/cf", "not llm/alpha"]),
        ("embed_items", [], ["not llm/"]),
        ("embed_items", ["--run=mine"], ["reads W/llm/mine"]),
        ("recommend", ["--item=1", "--untrained"], ["not llm/alpha", "not W/cf"]),
        ("recommend", ["--item=1", "--guidance=1"], ["reads W/llm/alpha_0.3", "reads W/cf"]),
        ("recommend", ["--input=a.csv", "--output=b"], ["reads a.csv", "writes b"]),
        (
            "export",
            ["--format=peft", "--output=b", "--push=me/x"],
            ["reads W/llm/alpha_0.3", "writes b", "writes me/x"],
        ),
        ("import_cf_logits", ["--source=a.npy", "--split=test"], ["reads a.npy"]),
        ("export_cf_logits", ["--output=b"], ["reads W/cf/logits", "writes b"]),
        (
            "export_cf_logits",
            ["--output=b", "--mix=c,d"],
            ["reads c", "reads d", "not W/cf/logits"],
        ),
        ("serve", ["--port=80"], ["reads W/cf", "reads W/llm/alpha_0.3"]),
        ("compile_ahead", ["--target=v5e-16"], ["compiles for v5e-16"]),
    ],
)
def test_a_dry_run_says_what_is_read_and_written_and_touches_nothing(
    tmp_path, script, flags, expected
):
    workdir = tmp_path / "run"
    command = [f"{ROOT}/launch/{script}.py", "--dry_run", f"--workdir={workdir}"]
    config = f"--config={ROOT}/configs/quickstart.py:alpha=0.3"
    done = Script([*command, config, *flags], dict(os.environ)).completed()
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first == f"{script}: the config is valid"
    found = [line.strip().replace(str(workdir), "W") for line in lines]
    for line in expected:
        unexpected = line.removeprefix("not ")
        if unexpected != line:
            assert unexpected not in done.stdout.replace(str(workdir), "W")
        else:
            absent = " (not there yet)" if line.startswith("reads W") else ""
            assert line + absent in found
    assert not workdir.exists()
    bad = Script([*command, config + ",tau=0", *flags], dict(os.environ)).completed()
    assert bad.returncode in (1, 2)
    assert bad.stderr.strip().endswith("objective.tau is 0.0: expected 0.000001 to 1000000")


def test_a_dry_run_says_what_is_not_there_yet(tmp_path):
    (tmp_path / "data").mkdir()
    flags = f"--config={ROOT}/configs/quickstart.py", f"--workdir={tmp_path}", "--dry_run"
    done = Script([f"{ROOT}/launch/evaluate.py", *flags], dict(os.environ)).completed()
    assert f"  reads {tmp_path}/data\n" in done.stdout
    assert f"  reads {tmp_path}/llm/plain (not there yet)\n" in done.stdout


def test_what_a_user_wrote_is_logged_and_printed_as_it_is(tmp_path):
    body = r"logging.warning('reading %s', '[/b] é\x1b[2J'); show('[/b] é\x1b[2J')"
    done = completed(tmp_path, body)
    assert done.stderr.splitlines()[-1] == r"reading [/b] é\x1b[2J"
    assert done.stdout == r"[/b] é\x1b[2J" + "\n"


def test_log_lines_are_shown_by_where_their_module_lies():
    def shown(path, level=logging.INFO):
        return is_ours_or_a_warning(logging.LogRecord("absl", level, str(path), 1, "", (), None))

    package = Path(tca4rec_jax.__file__).parent
    assert shown(package / "training" / "loop.py")
    # A checkout in a folder of the package's name, with its environment inside.
    assert not shown("/home/me/tca4rec_jax/.venv/lib/python3.12/site-packages/orbax/checkpoint.py")
    assert not shown(jax.__file__)
    assert shown(jax.__file__, logging.WARNING)
    assert not shown(f"{package}_notes.py")


def test_programs_are_kept_in_a_private_folder_of_bounded_size(tmp_path):
    body = """print(jax.config.jax_compilation_cache_dir, jax.config.jax_compilation_cache_max_size)
    (jnp.zeros(3) + 1).block_until_ready()"""
    folder = tmp_path / "cache" / "programs"
    environment = dict(os.environ) | {"TCA4REC_CACHE": str(tmp_path / "cache")}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    for mode in (0o700, 0o777):  # the second one was opened to others
        done = completed(tmp_path, body, environment=environment)
        assert done.stdout.splitlines()[-1] == f"{folder} {4 << 30}"
        assert folder.stat().st_mode & 0o777 == 0o700
        folder.chmod(mode)
    (tmp_path / "file").touch()
    environment["TCA4REC_CACHE"] = str(tmp_path / "file")
    done = completed(tmp_path, body, environment=environment)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "None -1"
    assert "Compiled programs are not kept: " in done.stderr


def test_quiet_leaves_results_and_warnings(tmp_path):
    body = "logging.info('reading'); logging.warning('take care'); show('1 row')"
    flags = f"--config={ROOT}/configs/quickstart.py", f"--workdir={tmp_path}/run", "--quiet"
    done = completed(tmp_path, body, *flags)
    assert done.stdout == "1 row\n"
    assert done.stderr.endswith("take care\n")
    assert "reading" not in done.stderr
