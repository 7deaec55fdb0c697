"""Plans as text: what an overlay would lay, and the steps of a flash."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import wrap

from provisioning.flash_plan import FlashPlan, Step
from provisioning.overlay import Overlay

WIDTH = 112


def overlay_lines(overlay: Overlay) -> Iterator[str]:
    """Yield a line for each file: what would become of it, mode, bytes, path, and what it replaces."""
    for found in overlay.found:
        entry = found.entry
        what = f"-> {entry.link}" if entry.link is not None else ""
        was = f"(was {found.was})" if found.was else ""
        mode = "link" if entry.link is not None else f"{entry.mode:04o}"
        yield " ".join(filter(None, (f"{found.state:10} {mode} {entry.size:>11}  {entry.path}", what, was)))
    for warning in overlay.warnings:
        yield from wrap(f"! {warning}", WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def plan_lines(plan: FlashPlan) -> Iterator[str]:
    """Yield the plan: what for, and its steps."""
    choice, wanted = plan.choice, plan.choice.wanted
    mode = ", Super" if choice.config.super else ""
    many = f", one image for {wanted.boards} boards at a time" if wanted.massflash else ""
    yield f"{choice.profile.title}: JetPack {wanted.jetpack} (L4T {choice.l4t}) to {wanted.storage}{mode}{many}"
    for number, step in enumerate(plan.steps, 1):
        yield ""
        yield from step_lines(step, str(number))


def step_lines(step: Step, number: str) -> Iterator[str]:
    """Yield a step's title, reason, command or what hands do, and notes."""
    yield f"{number}. {step.title}"
    yield from _folded(f"{step.why[0].upper()}{step.why[1:]}.", "   ")
    if step.argv:
        yield f"   $ {f'cd {step.folder} && ' if step.folder else ''}{step.line}"
    for hand in step.by_hand:
        yield from _folded(f"- {hand}", "   ", "     ")
    for note in step.notes:
        yield from _folded(f"({note})" if not note.startswith("(") else note, "   ", "    ")


def _folded(text: str, first: str, rest: str | None = None) -> list[str]:
    return wrap(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=first if rest is None else rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
