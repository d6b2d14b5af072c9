"""The watchdog in a process of its own, which it ends."""

from forked import Script

from tca4rec_jax.training.fault_tolerance import HUNG

HANGS = """
import time
from tca4rec_jax.training.fault_tolerance import Watchdog

def collective_that_never_returns():
    time.sleep(600)

with Watchdog(0, "off", 0), Watchdog({seconds}, "train", 3) as watchdog:
    for step in range(4, 7):
        time.sleep(0.1)
        watchdog.progress(step)
    if {hang}:
        collective_that_never_returns()
print("done")
"""


def run(folder, seconds, hang):
    path = folder / "hangs.py"
    path.write_text(HANGS.format(seconds=seconds, hang=hang))
    return Script([str(path)], {}).completed()


def test_a_hung_step_ends_the_process_and_shows_where(tmp_path):
    done = run(tmp_path, seconds=2, hang=True)
    assert done.returncode == HUNG
    assert "train: step 6 was not done after 2 s" in done.stderr
    assert "in collective_that_never_returns" in done.stderr


def test_steps_that_get_done_are_left_alone(tmp_path):
    done = run(tmp_path, seconds=2, hang=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
