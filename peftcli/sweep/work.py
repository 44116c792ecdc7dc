"""Working on a sweep: claim a member, run it in a process of its own, write down what became of it,
until none is left. Any number of processes do this on one folder at once.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from peftcli.errors import Stopped
from peftcli.settings import Sweep
from peftcli.sweep import claims, process
from peftcli.sweep.board import Board
from peftcli.sweep.claims import Claim
from peftcli.sweep.ledger import ENDED, Ledger, Member
from peftcli.sweep.process import Running, Slot, Verdict
from peftcli.sweep.pruning import Stop

POLL = 0.05  # seconds between looks at the running processes
SCAN = 1.0  # seconds between looks at the folder, where there is nothing to start
Hopeless = Callable[[Ledger, Member], Stop | None]  # why a running member need not go on


@dataclass
class Worker:
    """This process's share of the work on a sweep."""

    ledger: Ledger
    settings: Sweep
    slots: Sequence[Slot]
    board: Board
    ids: Collection[str] | None = None  # the members to work on; None: all
    ask_for_more: Callable[[], bool] | None = None  # a search: plans further members, if any
    hopeless: Hopeless | None = None
    stop_file: Path | None = None  # asks for the end where a signal cannot come
    body: process.Body = process.as_run
    running: list[Running] = field(default_factory=list)
    tried: set[str] = field(default_factory=set)  # they end here once; a stopped one waits
    signals: list[int] = field(default_factory=list)
    next_scan: float = 0.0

    @property
    def was_stopped(self) -> bool:
        """Whether a signal has asked for the end."""
        return bool(self.signals)

    def work(self) -> None:
        """Return when all members have ended, or, after a signal, when those here have."""
        with self._forwarding(), self.board.shown():
            while True:
                self._look_after_running()
                if self.stop_file is not None and not self.was_stopped and self.stop_file.exists():
                    self._heard(signal.SIGTERM, None)
                if not self.was_stopped and self._may_look():
                    self._fill()
                    if not self.running and self._is_finished():
                        return
                if self.was_stopped and not self.running:
                    return
                self.board.refresh(self.running)
                time.sleep(POLL)

    # -- Starting ----------------------------------------------------------------------------------
    def _members(self) -> list[Member]:
        return [m for m in self.ledger.members() if self.ids is None or m.id in self.ids]

    def _free_slots(self) -> list[Slot]:
        taken = {running.slot.number for running in self.running}
        return [slot for slot in self.slots if slot.number not in taken]

    def _may_look(self) -> bool:
        """Whether it is time to look for members; a slot that fell free makes it so at once."""
        return bool(self._free_slots()) and time.monotonic() >= self.next_scan

    def _fill(self) -> None:
        """Start members as long as there are slots for them."""
        while self._free_slots() and not self.was_stopped:
            found = self._next()
            if found is None:
                return
            self._start(*found)

    def _next(self) -> tuple[Member, Claim] | None:
        """A member that is to be run, claimed."""
        members = self._members()
        limit = self.settings.max_failures
        if limit is None or num_failures(members) < limit:
            for member in members:
                found = self._claimed(member)
                if found is not None:
                    return found
            if self.ask_for_more is not None and self.ask_for_more():
                return self._next()
        self.next_scan = time.monotonic() + SCAN
        return None

    def _claimed(self, member: Member) -> tuple[Member, Claim] | None:
        if member.state in ENDED or member.id in self.tried:
            return None
        claim = claims.take(self.ledger.claims, member.id, self.settings.stale_after)
        if claim is None:
            return None
        now = self.ledger.member(member.id)  # as its last holder left it
        assert now is not None
        if (self.ledger.run_dir(now.id) / "result.json").exists() and now.state not in ENDED:
            now = self.ledger.write(now, state="done", exit_code=0, reason=None)
        if now.state in ENDED:
            claim.release()
            return None
        return now, claim

    def _start(self, member: Member, claim: Claim) -> None:
        self.tried.add(member.id)
        goes_on = member.attempts > 0
        member = self.ledger.write(
            member, state="running", attempts=member.attempts + 1, exit_code=None, reason=None
        )
        folder, slot = self.ledger.run_dir(member.id), self._free_slots()[0]
        self.running.append(process.start(member, claim, slot, folder, self.running, self.body))
        self.board.started(member, goes_on)

    def _is_finished(self) -> bool:
        """Whether nothing is left that this process could still have to do."""
        members = self._members()
        limit = self.settings.max_failures
        if limit is not None and num_failures(members) >= limit:
            return True
        return all(m.state in ENDED or m.id in self.tried for m in members)

    # -- While they run ----------------------------------------------------------------------------
    def _look_after_running(self) -> None:
        for running in list(self.running):
            code = running.exit_code()
            if code is not None:
                self.running.remove(running)
                self.next_scan = 0.0
                self._settle(running, code)
                continue
            if not running.claim.renew(self.settings.stale_after / 4):
                running.kill()
            elif running.told is None:
                self._stop_if_due(running)
            running.kill_if_deaf()

    def _stop_if_due(self, running: Running) -> None:
        limit = self.settings.timeout
        if limit is not None and running.seconds > limit:
            reason = f"took longer than sweep.timeout={limit:g} seconds"
            running.verdict = Verdict("failed", reason)
        elif self.hopeless is not None and time.monotonic() - running.judged > SCAN:
            running.judged = time.monotonic()
            stop = self.hopeless(self.ledger, running.member)
            running.verdict = Verdict("pruned", *stop) if stop is not None else None
        if running.verdict is not None or self.was_stopped:
            running.stop()

    def _settle(self, running: Running, code: int) -> None:
        """Write down what became of a member whose process has ended."""
        if running.claim.is_lost():
            self.board.lost(running.member)
            return
        became = outcome(running, code, self.was_stopped)
        seconds = round((running.member.seconds or 0.0) + running.seconds, 3)
        member = self.ledger.write(
            running.member, exit_code=code, seconds=seconds, **became._asdict()
        )
        running.claim.release()
        self.board.ended(member, self.ledger)

    # -- Signals -----------------------------------------------------------------------------------
    @contextmanager
    def _forwarding(self) -> Iterator[None]:
        """Signals ask the members to save and stop; a second SIGINT to stop at once."""
        heeded = [n for n in process.SIGNALS if signal.getsignal(n) != signal.SIG_IGN]  # nohup
        before = {number: signal.signal(number, self._heard) for number in heeded}
        try:
            yield
        except BaseException:
            for running in self.running:
                running.stop()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        again = self.was_stopped and number == signal.SIGINT
        self.signals.append(number)
        for running in self.running:
            running.stop(signal.SIGINT if again else signal.SIGTERM)


def outcome(running: Running, code: int, was_asked: bool) -> Verdict:
    """What became of a member whose process ended with `code`."""
    if code == 0 and (running.folder / "result.json").exists():
        return Verdict("done")
    if running.verdict is not None:
        return running.verdict
    if code == Stopped.exit_code or (was_asked and code < 0):
        return Verdict("stopped")
    return Verdict("failed", running.reason(code))


def num_failures(members: Sequence[Member]) -> int:
    """Members that were started and failed."""
    return sum(m.state == "failed" and m.attempts > 0 for m in members)
