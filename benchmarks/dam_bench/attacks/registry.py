"""Register the attacks of all suites by name, also those of other packages.

An entry point of the group `dam_bench.attacks` names the module of another package to import; every process of the
benchmark imports it (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from dam_bench.attacks.attacker import Attacker
from mergekit_dam.errors import DamError, did_you_mean
from mergekit_dam.registry import Registry, code_of

INTERFACE = 1  # of Attacker; a new number where attackers that were written for an older one may stop to work
GROUP = "dam_bench.attacks"
ATTACKS: Registry[Attacker] = Registry("attack", group=GROUP)  # by "suite/attack"


def register_attack(name: str, attacker: Attacker, *, suites: Collection[str], interface: int) -> None:
    """Make an attack known under a name.

    Args:
        name: of the attack, in scenarios and results.
        attacker: the attack.
        suites: names of the suites whose models it attacks.
        interface: the version of `Attacker` for which it was written.

    Raises:
        DamError: another version of the interface, or a name that is taken.
    """
    if interface != INTERFACE:
        raise DamError(
            f"attack {name!r}",
            expected=f"interface {INTERFACE} of this benchmark's attacks",
            got=f"an attack for interface {interface}",
            cure="Change it as docs/extending.md says, or install the benchmark for which it was written.",
        )
    for suite in suites:
        ATTACKS.add(f"{suite}/{name}", attacker)


def attack_names(suite: str) -> tuple[str, ...]:
    """Return the names of a suite's attacks, in the order of their registration."""
    ATTACKS.names()  # imports the modules of other packages
    return tuple(key.partition("/")[2] for key in ATTACKS.entries if key.startswith(f"{suite}/"))


def attacker_named(suite: str, attack: str) -> Attacker:
    """Return an attack of a suite by its name.

    Raises:
        DamError: an unknown name, with the nearest known one.
    """
    attacker = ATTACKS.get(f"{suite}/{attack}")
    if attacker is None:
        names = attack_names(suite)
        raise DamError(
            f"attack on suite {suite}",
            expected=f"one of {', '.join(names)}",
            got=repr(attack),
            cure=did_you_mean(attack, names) or "Choose one of them, or install the package that registers it.",
        )
    return attacker


def outside_code(attacker: Attacker) -> dict[str, Any]:
    """JSON of the code of another package's attack, for the keys of its models; empty for this benchmark's own."""
    if type(attacker).__module__.startswith("dam_bench."):
        return {}
    return {"code": code_of(attacker)}
