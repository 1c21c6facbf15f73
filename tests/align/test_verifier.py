"""Code that nobody has read: every outcome, every way to misbehave, and that nothing of it survives."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from gptcore.align.verifier import Job, Limits, Verifier
from gptcore.errors import UserError

ADD = "def add(a, b):\n    return a + b\n"
SHORT = Limits(seconds=0.7)
PATIENT = Limits(seconds=30, cpu_seconds=30)  # a busy machine is no reason to fail


def _granted() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Verifier() as verifier:
            return verifier.isolation


@pytest.fixture(scope="module", params=["namespaces", "limits"])
def verifier(request):
    if request.param == "namespaces" and _granted() != "namespaces":
        pytest.skip("this system grants no namespaces")
    with Verifier(limits=PATIENT, isolation=request.param) as made:
        yield made


@pytest.fixture(scope="module")
def confined():
    if _granted() != "namespaces":
        pytest.skip("this system grants no namespaces")
    with Verifier(limits=PATIENT, isolation="namespaces") as made:
        yield made


def _descendants(pid: int) -> set[int]:
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def _resting(verifier) -> set[int]:
    """The processes of the one worker while it has nothing to do."""
    pid = verifier._workers[0]._process.pid
    return {pid} | _descendants(pid)


def test_a_right_and_a_wrong_program(verifier):
    assert verifier.run(Job(ADD, test="assert add(2, 3) == 5")).passed
    wrong = verifier.run(Job(ADD, test="assert add(2, 3) == 6, 'sum'"))
    assert (wrong.outcome, wrong.detail) == ("failed", "AssertionError: sum (<test> line 1)")
    broken = verifier.run(Job("x = 1\ny = x / 0"))
    assert (broken.outcome, broken.detail) == (
        "failed",
        "ZeroDivisionError: division by zero (<program> line 2)",
    )
    assert verifier.run(Job("def f(:")).detail.startswith("SyntaxError")
    assert verifier.run(Job("f = lambda: f()\nf()")).detail.startswith("RecursionError")


def test_the_value_is_compared_in_this_process(verifier):
    call = Job(ADD, call="add", arguments=([1], [2]))
    assert verifier.run(call, expected=(1, 2)).passed
    refused = verifier.run(call, expected=[1, 3])
    assert (refused.outcome, refused.value, refused.detail) == ("failed", [1, 2], "returned [1, 2]")
    one = Job("def f():\n    return 1", call="f")
    assert verifier.run(one, expected=1).passed
    assert verifier.run(one, expected=True).outcome == "failed"
    assert verifier.run(Job(ADD, call="sub")).detail == "the program defines no sub"
    assert verifier.run(Job("def f():\n    return {1}", call="f")).detail.startswith("TypeError")


@pytest.mark.parametrize(
    "source, outcome",
    [
        ("while True: pass", "timeout"),
        ("import time\ntime.sleep(60)", "timeout"),
        ("import os, time\nfor end in (0, 1, 2, 3): os.close(end)\ntime.sleep(60)", "timeout"),
        ("import signal, time\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n"
         "    except OSError: pass\nwhile True: time.sleep(1)", "timeout"),
        ("x = bytearray(1 << 30)", "memory"),
        ("x = []\nwhile True: x.append(' ' * 10_000_000)", "memory"),
        ("import os\nos.abort()", "crashed"),
        ("import os\nos._exit(0)", "crashed"),
        ("import os\nos.kill(os.getpid(), 9)", "crashed"),
        ("import ctypes\nctypes.string_at(0)", "crashed"),
        ("import os\nos.write(3, b'nonsense')\nos._exit(0)", "crashed"),
        ("raise SystemExit(0)", "failed"),
        ("input()", "failed"),
        ("while True: print('x' * 100)", "said too much"),
        ("import os\nwhile True: os.write(2, b'x' * 4096)", "said too much"),
    ],
)  # fmt: skip
def test_outcomes(verifier, source, outcome):
    verdict = verifier.run(Job(source), limits=SHORT if outcome == "timeout" else PATIENT)
    assert verdict.outcome == outcome, verdict.detail
    assert verifier.run(Job(ADD, call="add", arguments=(1, 1)), expected=2).passed


def test_output_is_cut_at_the_limit(verifier):
    verdict = verifier.run(Job("while True: print('x' * 100)"), limits=replace(PATIENT, output=1000))
    assert verdict.outcome == "said too much" and len(verdict.output) == 1000
    exact = verifier.run(Job("print('y' * 999)"), limits=replace(PATIENT, output=1000))
    assert exact.passed and exact.output == "y" * 999 + "\n"
    value = verifier.run(
        Job("def f():\n    return 'x' * 100_000", call="f"), limits=replace(PATIENT, output=1000)
    )
    assert value.outcome == "said too much"


def test_processor_time_counts_where_the_clock_is_generous(verifier):
    verdict = verifier.run(Job("while True: pass"), limits=Limits(seconds=60, cpu_seconds=1))
    assert verdict.outcome == "timeout" and verdict.detail.startswith("killed by SIG")


def test_the_place_is_empty_and_alone(verifier):
    seen = verifier.run(
        Job("import os, sys\ndef f():\n    return [os.listdir('.'), dict(os.environ), os.getuid() == 0, "
            "os.getsid(0) in (1, os.getpid()), sys.stdin.read()]", call="f")
    )  # fmt: skip
    files, environment, root, alone, said = seen.value
    assert files == [] and said == "" and alone and not root
    assert set(environment) <= {"LC_CTYPE"}


def test_a_full_disk_and_a_clean_one_after_it(verifier):
    one = Job("with open('a', 'wb') as f:\n    while True: f.write(b'x' * 65536)")
    assert verifier.run(one, limits=replace(PATIENT, directory=1 << 20)).outcome == "failed"
    many = Job("n = 0\nwhile True:\n    open(str(n), 'wb').write(b'x' * 9999)\n    n += 1")
    verdict = verifier.run(many, limits=replace(PATIENT, directory=1 << 20))
    assert verdict.outcome == "failed", verdict
    assert verifier.run(Job("import os\ndef f():\n    return os.listdir('.')", call="f"), expected=[]).passed


def test_a_fork_bomb(verifier):
    before = _resting(verifier)
    for source in (
        "import os\nwhile True: os.fork()",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()",
    ):
        verdict = verifier.run(Job(source), limits=Limits(seconds=0.7, processes=8))
        assert verdict.outcome in ("failed", "timeout"), verdict
        assert _resting(verifier) == before


def test_children_that_are_left_behind_do_not_survive(confined):
    before = _resting(confined)
    source = """
import os, signal, time
for _ in range(4):
    if os.fork() == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.fork() == 0:
            time.sleep(60)
        time.sleep(60)
"""
    verdict = confined.run(Job(source), limits=replace(PATIENT, processes=8))
    assert verdict.passed and verdict.seconds < PATIENT.seconds
    assert _resting(confined) == before


def test_the_number_of_processes_is_exact(confined):
    source = "import os, time\nfor _ in range({}):\n    if os.fork() == 0:\n        time.sleep(9)"
    for count in (1, 3):
        assert confined.run(Job(source.format(count)), limits=replace(PATIENT, processes=count)).passed
        assert (
            confined.run(Job(source.format(count + 1)), limits=replace(PATIENT, processes=count)).outcome
            == "failed"
        )


def test_it_cannot_signal_anyone_outside(confined):
    source = """
import os, signal
for who in (os.getppid(), -1, -os.getpgid(os.getppid())):
    for number in (signal.SIGTERM, signal.SIGKILL):
        try: os.kill(who, number)
        except OSError: pass
"""
    before = _resting(confined)
    confined.run(Job(source))
    assert _resting(confined) == before
    reach = f"import os\nos.kill({os.getpid()}, 0)"
    assert "ProcessLookupError" in confined.run(Job(reach)).detail


def test_a_job_that_takes_its_worker_down_is_told_and_the_worker_replaced(verifier):
    killer = Job("import os\nos.kill(os.getppid(), 9)\nimport time\ntime.sleep(60)")
    assert verifier.run(killer, limits=SHORT).outcome in ("crashed", "timeout", "failed")
    assert verifier.run(Job(ADD, call="add", arguments=(1, 1)), expected=2).passed


def test_there_is_no_network_and_nothing_outside_can_be_written(confined, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        verdict = confined.run(Job(f"import socket\nsocket.create_connection(('127.0.0.1', {port}))"))
    assert verdict.detail.startswith("OSError: [Errno 101] Network is unreachable"), verdict
    tmp_path.chmod(0o777)
    verdict = confined.run(Job(f"open({str(tmp_path / 'a')!r}, 'w')"))
    assert verdict.outcome == "failed" and list(tmp_path.iterdir()) == []
    assert confined.run(Job("open('/dev/shm/x', 'w')")).outcome == "failed"
    assert confined.run(Job("import os\nassert os.listdir('/proc') == []")).passed


def test_it_can_get_no_capabilities(confined):
    source = "import ctypes\nlibc = ctypes.CDLL(None)\nassert libc.unshare({}) != 0"
    for flag in (0x10000000, 0x00020000):
        verdict = confined.run(Job(source.format(flag)))
        assert verdict.passed, verdict
    assert confined.run(Job("import os\nos.setuid(0)")).outcome == "failed"


def test_draws_and_hashes_do_not_depend_on_the_run():
    source = "import random\ndef f():\n    return [random.random(), hash('text')]"
    values = []
    for _ in range(2):
        with Verifier(limits=PATIENT, isolation="limits") as verifier:
            values += [verifier.run(Job(source, call="f")).value for _ in range(2)]
    assert values[0] == values[1] == values[2] == values[3]


def test_many_jobs_keep_their_order_over_workers():
    with Verifier(workers=2, limits=PATIENT, isolation="limits") as verifier:
        jobs = [Job(f"def f():\n    return {i}", call="f") for i in range(100)]
        verdicts = verifier.run_many(jobs)
    assert [verdict.value for verdict in verdicts] == list(range(100))


def test_a_checker_of_the_users_own(verifier):
    checker = "def score(completion, truth):\n    return sum(a == b for a, b in zip(completion, truth)) / len(truth)"
    verdict = verifier.run(Job(checker, call="score", arguments=("abcx", "abcd")))
    assert verdict.passed and verdict.value == 0.75


def test_modules_from_a_directory_that_is_named(tmp_path):
    (tmp_path / "rules.py").write_text("LIMIT = 7\n")
    tmp_path.chmod(0o755)
    with Verifier(limits=PATIENT, isolation="limits") as verifier:
        assert verifier.run(Job("import rules")).detail.startswith("ModuleNotFoundError")
        assert verifier.run(Job("import gptcore.models")).outcome == "failed"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_killed_owner_takes_everything_along():
    program = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "from gptcore.align.verifier import *\nv = Verifier()\nprint('ready', flush=True)\n"
        "v.run(Job('import time\\ntime.sleep(60)'), limits=Limits(seconds=60))"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None and owner.stdout.readline() == "ready\n"
    time.sleep(0.3)
    theirs = _descendants(owner.pid)
    assert len(theirs) >= 2
    owner.kill()
    owner.wait()
    deadline = time.monotonic() + 5
    while (left := {pid for pid in theirs if Path(f"/proc/{pid}").exists()}) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def test_bad_input_is_refused():
    with pytest.raises(UserError, match="workers"):
        Verifier(0)
    with pytest.raises(UserError, match=r"Limits\.memory: got 1000"):
        Limits(memory=1000)
    with Verifier(limits=PATIENT, isolation="limits") as verifier:
        with pytest.raises(UserError, match="expected needs a job with a call"):
            verifier.run(Job("x = 1"), expected=1)
        with pytest.raises(UserError, match="JSON"):
            verifier.run(Job("def f(x): pass", call="f", arguments=({1, 2},)))
    with pytest.raises(UserError, match="closed"):
        verifier.run(Job("x = 1"))


def test_nothing_lies_around_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tmp_path.chmod(0o755)
    with Verifier(limits=PATIENT, isolation="limits") as verifier:
        verifier.run(Job("open('left', 'w').write('x')"))
        pid = verifier._workers[0]._process.pid
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
