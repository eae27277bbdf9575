"""`tools/h200.sh`: order, limits, resuming, exit status; and the whole dry run, interpreted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools/h200.sh"
# Stands in for Python: notes what it was asked, and ends as the test wants for that tool.
SHIM = """#!/usr/bin/env bash
[[ $1 == - ]] && { echo "${KIND:-h200}" >"$3"; exit "${EXIT_machine:-0}"; }
[[ $1 == -c ]] && exit 0
echo "$*" >>"$CALLS"
for tool in tune peers profile_nsa prewarm pytest; do
  [[ " $* " == *"$tool"* ]] || continue
  name="SLEEP_$tool"; sleep "${!name:-0}"
  name="EXIT_$tool"; exit "${!name:-0}"
done
"""


def start(folder, *, peers="", **env):
    """Starts the script with the shim."""
    shim, calls = folder / "python", folder / "calls"
    shim.write_text(SHIM)
    shim.chmod(0o755)
    calls.write_text("")
    for name in peers.split():
        (folder / "peers" / name).mkdir(parents=True, exist_ok=True)
        (folder / "peers" / f"{name}.commit").write_text(f"sha-of-{name}\n")
    settings = {"PYTHON": str(shim), "CALLS": str(calls), "REVISION": "r1"}
    settings |= {"TRITON_CACHE_DIR": str(folder / "cache"), **env}
    return subprocess.Popen(
        [SCRIPT, folder / "peers", folder / "out"], env=os.environ | settings, text=True,
        stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def ended(process, folder):
    """Exit status, output, rows of steps, calls."""
    out, _ = process.communicate()
    steps = [json.loads(line) for line in (folder / "out/steps.jsonl").read_text().splitlines()]
    return process.returncode, out, steps, (folder / "calls").read_text().splitlines()


@pytest.fixture
def script(tmp_path):
    """Runs the script with the shim to its end."""
    return lambda **settings: ended(start(tmp_path, **settings), tmp_path)


@pytest.fixture(scope="module", autouse=True)
def hanging(tmp_path_factory):
    """A run with a step that hangs, which takes its 11 seconds beside the other tests."""
    folder = tmp_path_factory.mktemp("hanging")
    process = start(folder, BUDGET="11", SLEEP_profile_nsa="600")
    yield process, folder
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def by_name(steps):
    return {row["step"]: row["status"] for row in steps}


def begun(steps):
    return [row["step"] for row in steps if row["status"] == "began"]


def test_every_step_runs_once_most_important_first(script):
    code, _, steps, calls = script(peers="fla xunhao")
    assert code == 0
    names = begun(steps)
    first = ["machine", "prewarm", "ops-8k", "profile", "bench-decode", "bench-64k", "ab"]
    assert names[:7] == first and len(names) == len(set(names))
    assert {"tune", "bench-1m", "bench-lengths", "runtime", "long", "sanitizer"} < set(names)
    assert set(by_name(steps).values()) == {"done"} and {r["revision"] for r in steps} == {"r1"}
    assert {row["kind"] for row in steps[1:]} == {"h200"}
    decode, bench = (call for call in calls if "--only nsa-neuron,sdpa-cudnn,sfnsa" in call)
    assert "--stages decode,dense_decode" in decode and "65536" in bench
    assert "--commit fla=sha-of-fla" in bench and "--xunhao " in bench and "--fsa" not in bench
    assert "--commit nsa-neuron=r1" in bench and "--resume" in bench and "--tiny" not in bench
    code, _, steps, calls = script()
    assert calls == [] and code == 0  # nothing is left for a second run
    # The machine is another one, perhaps, and has not compiled anything.
    assert begun(steps)[len(names) :] == ["machine", "prewarm"]


def test_every_op_has_a_process_of_its_own(script):
    _, _, _, calls = script(STEPS="ops-8k")
    stages = {call.split(" -k ")[1] for call in calls}
    wanted = ("dense", "nsa", "slc", "cmp", "select", "window", "decode")
    assert stages == {f"{stage} and 8192" for stage in wanted} and len(calls) == len(stages)


def test_an_op_that_fails_fails_the_step(script):
    code, _, steps, _ = script(STEPS="ops-8k", EXIT_pytest="1")
    assert code == 1 and by_name(steps) == {"ops-8k": "failed"}


def test_an_h100_is_named(script):
    _, _, steps, _ = script(KIND="h100")
    assert {row["kind"] for row in steps[1:]} == {"h100"}


def test_a_fresh_machine_compiles_again_and_goes_on_from_earlier_results(script, tmp_path):
    """The output folder comes back empty, as does the cache of compiled kernels."""
    script(STEPS="machine prewarm ops-8k profile")
    shutil.move(tmp_path / "out", tmp_path / "earlier")
    shutil.rmtree(tmp_path / "cache")
    again = {"STEPS": "machine prewarm ops-8k profile ab", "EARLIER": str(tmp_path / "earlier")}
    code, out, steps, calls = script(**again)
    assert code == 0 and "ops-8k: done by an earlier run" in out
    assert [call.split()[1] for call in calls] == ["tools.prewarm", "tools.tune"]
    assert begun(steps).count("profile") == 1


def test_what_kills_the_script_leaves_its_trace(script, tmp_path):
    """The step that was running is noted before it runs."""
    script(STEPS="machine")
    running = start(tmp_path, STEPS="profile", SLEEP_profile_nsa="600")
    file = tmp_path / "out/steps.jsonl"
    deadline = time.time() + 60
    while "profile" not in file.read_text() and time.time() < deadline:
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert by_name([json.loads(x) for x in file.read_text().splitlines()])["profile"] == "began"
    code, _, steps, _ = script(STEPS="profile")
    assert code == 0 and by_name(steps)["profile"] == "done"


def test_unfinished_and_failed_steps_are_tried_again(script):
    code, _, steps, _ = script(EXIT_tune="3", EXIT_profile_nsa="5")
    assert code == 1
    assert by_name(steps)["tune"] == "unfinished" and by_name(steps)["profile"] == "failed"
    code, _, steps, calls = script(EXIT_tune="3")
    assert code == 3
    assert {call.split()[1] for call in calls} == {"tools.tune", "tools.profile_nsa"}
    code, _, steps, calls = script()
    assert code == 0 and {call.split()[1] for call in calls} == {"tools.tune"}


def test_without_a_usable_gpu_nothing_counts_as_done(script):
    code, _, steps, calls = script(EXIT_machine="9")
    assert code == 2 and by_name(steps) == {"machine": "failed"} and calls == []
    code, _, steps, _ = script()
    assert code == 0 and by_name(steps)["machine"] == "done"


def test_an_internal_error_of_pytest_is_no_unfinished_step(script):
    code, _, steps, _ = script(EXIT_pytest="3")
    assert code == 1 and by_name(steps)["smoke"] == by_name(steps)["ops-8k"] == "failed"


def test_peers_without_git_get_no_commit_of_the_folder_around_them(script, tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    git = ["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "m"], check=True)
    (tmp_path / "peers/fla").mkdir(parents=True)
    _, _, _, calls = script()
    bench = next(call for call in calls if "tools.peers" in call)
    assert "--fla " in bench and "--commit fla" not in bench


def test_a_dry_run_shares_no_folder_with_a_real_one(script):
    code, _, steps, calls = script(DRY_RUN="1")
    assert code == 0 and all(row["dry_run"] for row in steps)
    assert all("--dry-run" in c or "--tiny" in c or "pytest" in c for c in calls)
    assert script()[0] == 2


def test_usage_is_its_own_comment():
    done = subprocess.run([SCRIPT], capture_output=True, text=True)
    assert done.returncode == 2 and "PEERS_FOLDER" in done.stdout
    assert "set -uo" not in done.stdout


@pytest.mark.slow
@pytest.mark.sim
def test_the_dry_run_measures_with_the_real_kernels(tmp_path):
    import sys

    mine = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    env = mine | {"DRY_RUN": "1", "PYTHON": sys.executable, "BUDGET": "600"}
    # test_tune.py has the tuner, test_own_stages.py the benchmark of forward and backward.
    env["STEPS"] = "machine ops-8k profile bench-decode"
    done = subprocess.run(
        [SCRIPT, tmp_path / "none", tmp_path / "out"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(x) for x in (tmp_path / "out/bench.jsonl").read_text().splitlines()]
    assert {(r["stage"], r["direction"]) for r in rows} == {("decode", "eager")}
    assert {r["status"] for r in rows} == {"ok"} and {r["device"] for r in rows} == {"cpu"}
    tests = [json.loads(x) for x in (tmp_path / "out/tests.jsonl").read_text().splitlines()]
    ended = [row for row in tests if row["outcome"] != "began"]
    assert {row["outcome"] for row in ended} == {"passed"} and 2 * len(ended) == len(tests)
    assert {"test_forward", "test_backward_is_right_and_bit_equal"} == {
        row["test"].split("::")[1].split("[")[0] for row in ended
    }
    profile = (tmp_path / "out/profile.jsonl").read_text().splitlines()
    assert {json.loads(x)["pass"] for x in profile} == {"forward", "backward", "decode"}


def test_a_step_that_hangs_is_ended_and_the_budget_holds(hanging):
    """Of 600 s that the step would take, it gets what is left."""
    code, out, steps, calls = ended(*hanging)
    assert code == 3 and by_name(steps)["profile"] == "unfinished"
    assert sum(row["seconds"] for row in steps) < 60
    assert "bench-64k: no time left" in out and not any("tools.peers" in call for call in calls)
