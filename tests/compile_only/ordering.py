"""What a kernel that starts before its predecessor has ended does before it waits for it.

Programmatic dependent launch lets a kernel run beside the one whose results it takes, up to its `griddepcontrol.wait`.
The compiler moves loads about and fills pipelines ahead of loops, so the place of the wait in the source says little:
this reads the PTX, and holds the machine code against it. Before the wait a kernel may read what older launches left.
It may not read what its predecessor writes, and may not write at all: memory that was given back and handed out again
may be its predecessor's still.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

WAIT, MACHINE_WAIT = "griddepcontrol.wait", "ACQBULK"
# PTX passes a tensor descriptor as itself, then its sizes and its strides, which are two each for a matrix.
_DESCRIPTOR_PARAMETERS = 5
_REGISTER = re.compile(r"%[a-z]+\d+")
_PARAMETER = re.compile(r"\w+_param_(\d+)")
_STATEMENT = re.compile(r"(?P<guard>@!?\S+\s+)?(?P<opcode>[\w.:]+)(?P<operands>.*)", re.DOTALL)
_MACHINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z]\w*)(\S*)\s*([^;]*);")
# Through the tensor memory accelerator (UTMA…), into shared memory (LDGSTS), or into registers.
_MACHINE_READS = {"LDG", "LDGSTS", "UTMALDG", "LD", "ATOMG", "ATOM", "RED", "REDG"}
_MACHINE_WRITES = {"STG", "UTMASTG", "UTMAREDG", "ST", "ATOMG", "ATOM", "RED", "REDG"}


@dataclass(frozen=True)
class Instruction:
    """An instruction of PTX: opcode, operands as they are written, whether a predicate may skip it."""

    opcode: str
    operands: str
    guarded: bool

    @property
    def writes(self) -> bool:
        """Whether it writes global memory."""
        if self.opcode.startswith("cp.async.bulk.tensor"):
            return ".global.shared" in self.opcode
        return _touches_global(self.opcode, "st", "red", "atom")

    @property
    def reads(self) -> bool:
        """Whether it reads global memory."""
        if self.opcode.startswith(("cp.async.bulk.tensor", "cp.async.c")) and ".commit" not in self.opcode:
            return not self.writes
        return _touches_global(self.opcode, "ld", "atom", "red")

    @property
    def source(self) -> str:
        """The address that it reads; copies name where they write first."""
        addresses = re.findall(r"\[([^\]]*)\]", self.operands)
        return str(addresses[1 if self.opcode.startswith("cp.async") else 0])

    @property
    def results(self) -> list[str]:
        """The registers that it writes."""
        if self.opcode.startswith(("st.", "cp.", "red.", "bra", "setp", "griddepcontrol")):
            return []
        operands = self.operands.strip()
        return _REGISTER.findall(operands.partition("}" if operands.startswith("{") else ",")[0])


def _touches_global(opcode: str, *names: str) -> bool:
    # Without a state space an address may be anywhere.
    name, *parts = opcode.split(".")
    return name in names and not any(part.startswith(("shared", "local", "param", "async")) for part in parts)


def early_faults(ptx: str, sass: str, types: Mapping[str, str | None], awaited: Sequence[str]) -> list[str]:
    """What a kernel does before it waits and must not do, in words.

    Args:
        ptx: its PTX.
        sass: its machine code, as `cuobjdump --dump-sass` lists it.
        types: its arguments with their types, as a `Variant` has them.
        awaited: those whose memory its predecessor writes.
    """
    unknown = [name for name in awaited if name not in types]
    if unknown:
        raise ValueError(f"awaited: found {', '.join(unknown)}, expected some of {', '.join(types)}")
    statements = list(_statements(ptx))
    early = [each for each in _before_wait(statements) if isinstance(each, Instruction)]
    origins, names = _origins(statements), _names(ptx, types)
    found = []
    for one in early:
        if one.reads:
            read = {names.get(number, "memory of Triton's own") for number in _named(one.source, origins)}
            found += [f"reads {name} before it waits for its predecessor" for name in awaited if name in read]
            if not read:
                found.append(f"reads what no argument points to before it waits for its predecessor: {one.opcode}")
        if one.writes:
            found.append(f"writes before it waits for its predecessor: {one.opcode}")
    machine = _machine_before_wait(sass)
    counts = [sum(one.reads for one in early), sum(opcode in _MACHINE_READS for opcode in machine)]
    if counts[0] != counts[1]:
        found.append(f"reads before it waits for its predecessor: {counts[0]} in PTX, {counts[1]} in machine code")
    if any(opcode in _MACHINE_WRITES for opcode in machine):
        found.append("writes before it waits for its predecessor, in machine code")
    return list(dict.fromkeys(found))


def _statements(ptx: str) -> Iterator[Instruction | str]:
    """The instructions and, as strings, the labels of the one kernel there is, in order."""
    text = re.sub(r"//[^\n]*", "", ptx)
    text = text[text.index("{", text.index(".entry")) + 1 :]
    pending = ""
    for line in map(str.strip, text.splitlines()):
        if not pending and (line in ("", "{", "}") or line.startswith(".")):
            continue
        if not pending and re.fullmatch(r"[$\w]+:", line):
            yield line.removesuffix(":")
            continue
        pending += f" {line}"
        if pending.endswith((";", "; }")):
            for part in filter(None, (part.strip(" {}") for part in pending.split(";"))):
                match = _STATEMENT.fullmatch(part)
                assert match is not None, part
                yield Instruction(match["opcode"], match["operands"], match["guard"] is not None)
            pending = ""


def _before_wait(statements: Sequence[Instruction | str]) -> list[Instruction | str]:
    """What can be reached without passing the wait."""
    places = defaultdict(list)
    for place, one in enumerate(statements):
        if isinstance(one, str):
            places[one].append(place)

    def follow(place: int) -> list[int]:
        one = statements[place]
        if isinstance(one, str):
            return [place + 1]
        if one.opcode in (WAIT, "ret", "exit"):
            return [place + 1] if one.guarded else []
        if one.opcode.split(".")[0] == "brx":
            raise ValueError(f"a branch to one of several labels: {one.operands.strip()}")
        if one.opcode.split(".")[0] != "bra":
            return [place + 1]
        # Labels of inlined blocks are there many times; each block branches to its own.
        target = min(places[one.operands.strip()], key=lambda label: abs(label - place))
        return [target, place + 1] if one.guarded else [target]

    return [statements[place] for place in _reached(follow, len(statements))]


def _machine_before_wait(sass: str) -> list[str]:
    """The opcodes that can be reached without passing the wait."""
    instructions = [match.groups() for match in _MACHINE.finditer(sass)]
    places = {int(address, 16): place for place, (address, *_) in enumerate(instructions)}

    def follow(place: int) -> list[int]:
        _, guard, opcode, _, operands = instructions[place]
        if opcode in (MACHINE_WAIT, "EXIT") and guard is None:
            return []
        targets = []
        if opcode in ("BRA", "BSSY", "CALL", "WARPSYNC"):
            targets = [places[int(target, 16)] for target in re.findall(r"\b0x[0-9a-f]+\b", operands)[-1:]]
        # A branch may also depend on a predicate among its operands, or on what a warp's threads do (BRA.DIV).
        always = opcode == "BRA" and guard is None and "," not in operands
        return targets if always else [*targets, place + 1]

    return [instructions[place][2] for place in _reached(follow, len(instructions))]


def _reached(follow: Callable[[int], list[int]], end: int) -> list[int]:
    """Every place that is reached from the first one."""
    seen, open_places = set(), [0]
    while open_places:
        place = open_places.pop()
        if place not in seen and place < end:
            seen.add(place)
            open_places += follow(place)
    return sorted(seen)


def _origins(statements: Sequence[Instruction | str]) -> dict[str, set[int]]:
    """For each register the parameters that its value is calculated from; what was loaded is calculated from none."""
    instructions = [
        one
        for one in statements
        if isinstance(one, Instruction) and one.results and (one.opcode.startswith("ld.param") or not one.reads)
    ]
    found: dict[str, set[int]] = defaultdict(set)
    changed = True
    while changed:
        changed = False
        for one in instructions:
            origins = _named(one.operands, found)
            for register in one.results:
                if not origins <= found[register]:
                    found[register] |= origins
                    changed = True
    return found


def _named(operands: str, origins: Mapping[str, set[int]]) -> set[int]:
    """The parameters that operands name, or that their registers come from."""
    named = {int(number) for number in _PARAMETER.findall(operands)}
    return named.union(*(origins.get(register, set()) for register in _REGISTER.findall(operands)))


def _names(ptx: str, types: Mapping[str, str | None]) -> dict[int, str]:
    """For each parameter of the PTX the argument it belongs to; Triton's own, behind the arguments, have none."""
    names: list[str] = []
    for name, kind in types.items():
        if kind is not None:
            names += [name] * (_DESCRIPTOR_PARAMETERS if kind.startswith("tensordesc") else 1)
    declared = ptx[ptx.index(".entry") : ptx.index("{", ptx.index(".entry"))].count(".param")
    if declared not in (len(names), len(names) + 1, len(names) + 2):
        raise ValueError(f"found {declared} parameters in PTX, expected {len(names)} and at most two of Triton's own")
    return dict(enumerate(names))
