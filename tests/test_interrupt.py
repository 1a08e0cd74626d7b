import os
import signal
import subprocess
import sys
import threading

import pytest

from peftkit import interrupt
from peftkit.errors import Interrupted


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_first_signal_asks(number, code):
    with interrupt.catch_signals():
        assert not interrupt.stop_requested()
        os.kill(os.getpid(), number)
        assert interrupt.stop_requested()
        with pytest.raises(Interrupted, match="here") as caught:
            interrupt.stop_if_requested("here")
    assert caught.value.exit_code == code
    assert not interrupt.stop_requested()


def test_second_signal_exits_at_once():
    program = (
        "import os, signal, time\nfrom peftkit import interrupt\nwith interrupt.catch_signals():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('both at once are one')\n    time.sleep(0.6)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    print('alive')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 143
    assert done.stdout in {"", "both at once are one\n"}
    assert "alive" not in done.stdout


def test_a_stop_that_others_asked_for_does_not_make_the_first_signal_the_second():
    with interrupt.catch_signals():
        interrupt.request_stop(signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.stop_requested()


def test_signals_are_only_noted_where_all_have_to_agree():
    with interrupt.catch_signals():
        with interrupt.deferred():
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupt.noted_signal() == signal.SIGINT and not interrupt.stop_requested()
        assert interrupt.stop_requested(), "nobody could agree any more"
        assert not interrupt.noted_signal()


def test_other_threads_keep_their_handlers():
    failures = []

    def work():
        try:
            with interrupt.catch_signals():
                pass
        except Exception as error:  # noqa: BLE001  whatever it is, the test reports it
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == []
