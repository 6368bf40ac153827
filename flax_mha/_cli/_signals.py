"""How signals end the process: at once while nothing is made, and tidily after that."""

import signal

stopped: list[int] = []  # by which signal
_ours: list[int] = []


def end_at_once() -> None:
    """Lets interrupts and terminations end the process, but for those it ignores.

    Raising an exception would not do: one that strikes jaxlib's import makes it crash.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        if (
            signal.getsignal(number) != signal.SIG_IGN
        ):  # as shells say in the background
            signal.signal(number, signal.SIG_DFL)
            _ours.append(number)


def end_tidily() -> None:
    """Lets them raise KeyboardInterrupt from now on, in a process that began so."""
    for number in _ours:
        signal.signal(number, _stop)


def _stop(number: int, _) -> None:
    signal.signal(number, signal.SIG_IGN)  # tidying is not stopped too
    stopped.append(number)
    raise KeyboardInterrupt
