"""Counts the instructions that one warp executes of a kernel, by following lane 0 through its SASS.

Integers, predicates and branches are computed as the hardware does; global memory is read where the
parameters point, shared memory reads as 0, and of what is stored only a thread's own is kept. So a
count is exact where control flow follows from the parameters alone, and lane 0 stands for its warp.
"""

from __future__ import annotations

import ctypes
import math
import re
import struct
from collections import Counter
from collections.abc import Sequence

MASK = 0xFFFFFFFF
PARAMETERS = 0x210  # where sm_90 has them in constant bank 0
LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?)(U?P[0-9T]) +)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;")
COMPARE = {
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
}
JOIN = {"AND": lambda a, b: a and b, "OR": lambda a, b: a or b, "XOR": lambda a, b: a != b}
# Without a result that control flow could depend on, or with one that is 0 here.
SILENT = set(
    """BAR BREAK BSSY BSYNC CCTL CGAERRBAR DEPBAR ERRBAR F2F F2FP FENCE HGMMA HMMA LDGDEPBAR LDGSTS
    LDS LDSM MEMBAR NOP ST STAS STG STS UCGABAR_ARV UCGABAR_WAIT WARPGROUP WARPSYNC
    YIELD""".split()  # noqa: SIM905
)


def functions(text: str) -> dict[str, str]:
    """Disassembled code by mangled name."""
    parts = re.split(r"^\.text\.(\S+):$", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def signed(x: int) -> int:
    return x - (1 << 32) if x >> 31 else x


def as_float(x: int) -> float:
    return struct.unpack("f", struct.pack("I", x))[0]


def bits(x: float) -> int:
    try:
        return struct.unpack("I", struct.pack("f", x))[0]
    except OverflowError:
        return 0x7F800000


class Warp:
    """Lane 0 of one warp."""

    def __init__(self, code: str) -> None:
        self.code: list[tuple] = []
        self.at: dict[str, int] = {}
        self.addresses: dict[int, int] = {}
        for line in code.splitlines():
            if label := re.match(r"(\S+):\s*$", line):
                self.at[label[1]] = len(self.code)
            elif found := LINE.search(line):
                address, negated, guard, name, rest = found.groups()
                self.addresses[int(address, 16)] = len(self.code)
                operands = [t.strip() for t in re.split(r",(?![^\[]*\])", rest) if t.strip()]
                self.code.append((negated, guard, name.split("."), operands))

    def run(self, parameters: bytes, grid: Sequence[int], block: int, warp: int) -> Counter[str]:
        threads, blocks = grid
        self.r, self.p, self.spilled = {}, {}, {}
        self.bank = bytearray(PARAMETERS) + parameters
        for place, value in ((0, threads), (4, 1), (8, 1), (12, blocks), (16, 1), (20, 1)):
            self.bank[place : place + 4] = value.to_bytes(4, "little")
        self.special = {"SR_TID.X": 32 * warp, "SR_CTAID.X": block}
        counts: Counter[str] = Counter()
        pc = 0
        while True:
            negated, guard, name, operands = self.code[pc]
            counts[name[0]] += 1
            pc += 1
            if guard and self.predicate(negated + guard) is False:
                continue
            if name[0] == "EXIT":
                return counts
            if name[0] in ("BRA", "CALL"):
                if "DIV" in name or not all(map(self.predicate, operands[:-1])):
                    continue
                pc = self.at[operands[-1].strip("`()")]
            elif name[0] == "RET":
                pc = self.addresses[self.value(operands[0])]
            else:
                self.execute(name, operands)

    def predicate(self, text: str) -> bool:
        if text.lstrip("!").endswith("PT"):
            return not text.startswith("!")
        return self.p.get(text.lstrip("!"), False) != text.startswith("!")

    def value(self, text: str, second: int = 0) -> int:
        """A 32-bit operand, or the word behind it."""
        if text.startswith(("-", "~", "|")) and not re.match(r"-?[0-9]|-INF", text):
            inner = self.value(text.strip("-~|"), second)
            if "c[" in text or "R" in text:
                return inner ^ MASK if text[0] == "~" else inner
        if register := re.match(r"[~|-]*(U?R)(Z|\d+)", text):
            kind, number = register.groups()
            return 0 if number == "Z" else self.r.get((kind, int(number) + second), 0)
        if place := re.match(r"[~|-]*c\[0x0\]\[(.*)\]", text):
            return self.constant(self.address(place[1]) + 4 * second, 4)
        if re.fullmatch(r"[+-]?INF|[+-]?QNAN", text):
            return 0xFF800000 if text[0] == "-" else 0x7F800000
        if re.fullmatch(r"-?0x[0-9a-f]+", text):
            return 0 if second else int(text, 16) & MASK
        return bits(float(text))

    def integer(self, text: str) -> int:
        """An operand with its sign, in two's complement that is not cut: so carries come out."""
        negative = text.startswith("-") and not re.match(r"-0x", text)
        x = self.value(text)
        return (1 << 32) - x if negative else x

    def number(self, text: str) -> float:
        plain = as_float(self.value(text))
        if not re.search(r"R|c\[", text):
            return plain
        plain = abs(plain) if "|" in text else plain
        return -plain if text.startswith("-") else plain

    def pair(self, text: str) -> int:
        return self.value(text) | self.value(text, 1) << 32

    def constant(self, place: int, size: int) -> int:
        return int.from_bytes(self.bank[place : place + size], "little")

    def address(self, text: str) -> int:
        total = 0
        for part in re.findall(r"-?0x[0-9a-f]+|U?R(?:Z|\d+)(?:\.64|\.U32|\.X4)*", text):
            if "R" not in part:
                total += int(part, 16)
            elif part.endswith(".64"):
                total += self.pair(part)
            else:
                total += self.value(part)
        return total

    def put(self, text: str, x: int, words: int = 1) -> None:
        kind, number = re.match(r"(U?R)(Z|\d+)", text).groups()
        if number != "Z":
            for word in range(words):
                self.r[kind, int(number) + word] = x >> 32 * word & MASK

    def set(self, text: str, x: bool) -> None:
        self.p[text] = bool(x)

    def execute(self, name: list[str], operands: list[str]) -> None:
        base, flags = name[0], set(name[1:])
        if base[0] == "U" and base[1:] in METHODS:
            base = base[1:]
        if base in METHODS:
            METHODS[base](self, flags, name, operands)
        elif base not in SILENT:
            raise NotImplementedError(".".join(name) + " " + ", ".join(operands))
        elif base in ("LDS", "F2F", "F2FP"):
            self.put(operands[0], 0, 4 if "128" in flags else 2 if "64" in flags else 1)


METHODS = {}


def method(*names: str):
    def register(function):
        METHODS.update(dict.fromkeys(names, function))
        return function

    return register


def _split(operands: list[str]) -> tuple[str, list[str], list[str]]:
    """The result, predicates that are written, and the sources."""
    written = 1
    while re.fullmatch(r"!?U?P[0-9T]", operands[written]):
        written += 1
    return operands[0], operands[1:written], operands[written:]


@method("MOV")
def _(w, flags, name, o):
    w.put(o[0], w.value(o[1]))


@method("CS2R")
def _(w, flags, name, o):
    w.put(o[0], 0, 1 if "32" in flags else 2)


@method("S2R", "S2UR")
def _(w, flags, name, o):
    w.put(o[0], w.special.get(o[1], 0))


METHODS["R2UR"] = lambda w, flags, name, o: w.put(o[0], w.value(o[-1]))


@method("LDC", "ULDC")
def _(w, flags, name, o):
    size = 8 if "64" in flags else 1 if "U8" in flags else 4
    place = re.match(r"c\[0x0\]\[(.*)\]", o[1])[1]
    w.put(o[0], w.constant(w.address(place), size), size // 4 or 1)


@method("LDG", "LD")
def _(w, flags, name, o):
    size = 16 if "128" in flags else 8 if "64" in flags else 4
    size = 1 if flags & {"U8", "S8"} else 2 if flags & {"U16", "S16"} else size
    inner = re.findall(r"\[([^\[\]]*)\]", o[1])[-1]
    raw = ctypes.string_at(w.address(inner), size)
    w.put(o[0], int.from_bytes(raw, "little"), size // 4 or 1)


@method("STL", "LDL")
def _(w, flags, name, o):
    place, value = o if name[0] == "STL" else reversed(o)
    first = w.address(place.rpartition("[")[2])
    words = 4 if "128" in flags else 2 if "64" in flags else 1
    if name[0] == "STL":
        w.spilled.update((first + 4 * i, w.value(value, i)) for i in range(words))
    else:
        x = sum(w.spilled.get(first + 4 * i, 0) << 32 * i for i in range(words))
        w.put(value, x, words)


@method("IADD3", "VIADD")
def _(w, flags, name, o):
    result, carries, sources = _split(o)
    total = sum(map(w.integer, sources[: 2 if name[0].endswith("VIADD") else 3]))
    if "X" in flags:
        total += sum(map(w.predicate, sources[3:]))
    w.put(result, total & MASK)
    if carries:
        w.set(carries[0], total >> 32 & 1)
        if len(carries) > 1:
            w.set(carries[1], total >> 32 > 1)


@method("IMAD")
def _(w, flags, name, o):
    result, carries, (a, b, c, *rest) = _split(o)
    wide = "WIDE" in flags or "HI" in flags
    read = (lambda t: w.value(t)) if "U32" in flags or not wide else (lambda t: signed(w.value(t)))
    x = read(a) * read(b)
    if a.startswith("-") != (b.startswith("-") and not b.startswith("-0x")):
        x = -x
    if wide:
        x += w.pair(c)
        if carries:
            w.set(carries[0], x >> 64 & 1)
        return w.put(result, x >> 32 if "HI" in flags else x, 1 if "HI" in flags else 2)
    x += w.integer(c) + (sum(map(w.predicate, rest)) if "X" in flags else 0)
    w.put(result, x & MASK)


@method("LEA")
def _(w, flags, name, o):
    result, carries, sources = _split(o)
    shift = w.value(next(s for s in reversed(sources) if s.startswith("0x")))
    a = w.value(sources[0]) if not sources[0].startswith("-") else -w.value(sources[0])
    if "HI" in flags:
        high = signed(a) >> 31 if "SX32" in flags else w.value(sources[2])
        x = ((high << 32 | a) << shift) >> 32
    else:
        x = a << shift
    x = (x & MASK) + w.value(sources[1])
    if "X" in flags:
        x += w.predicate(sources[-1])
    w.put(result, x & MASK)
    if carries:
        w.set(carries[0], x >> 32 & 1)


@method("SHF")
def _(w, flags, name, o):
    low, shift, high = w.value(o[1]), w.value(o[2]), w.value(o[3])
    x = high << 32 | low
    if flags & {"S32", "S64"} and high >> 31:
        x -= 1 << 64
    shift = min(shift, 63)
    x = x << shift if "L" in flags else x >> shift
    w.put(o[0], x >> 32 if "HI" in flags else x)


@method("LOP3")
def _(w, flags, name, o):
    result, predicates, (a, b, c, lut, *_) = _split_logic(o)
    x, y, z, table = (w.value(t) for t in (a, b, c, lut))
    out = 0
    for i in range(8):
        if table >> i & 1:
            out |= (x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z)
    w.put(result, out & MASK)
    for p in predicates:
        w.set(p, out & MASK)


def _split_logic(o: list[str]) -> tuple[str, list[str], list[str]]:
    if re.fullmatch(r"U?P[0-9T]", o[0]):  # the predicate stands first
        return o[1], [o[0]], o[2:]
    return o[0], [], o[1:]


@method("PLOP3")
def _(w, flags, name, o):
    inputs = [w.predicate(t) for t in o[2:5]]
    index = sum(x << (2 - i) for i, x in enumerate(inputs))
    first, second = (w.value(t) >> index & 1 for t in o[5:7])
    w.set(o[0], first)
    w.set(o[1], second)


@method("ISETP")
def _(w, flags, name, o):
    compare = next(f for f in name[1:] if f in COMPARE)
    join = JOIN[next(f for f in name[1:] if f in JOIN)]
    read = w.value if "U32" in flags else (lambda t: signed(w.value(t)))
    a, b = read(o[2]), read(o[3])
    result = COMPARE[compare](a, b)
    if "EX" in flags and a == b:
        result = w.predicate(o[5])
    w.set(o[0], join(result, w.predicate(o[4])))
    if o[1] not in ("PT", "UPT"):
        w.set(o[1], join(not result, w.predicate(o[4])))


@method("FSETP")
def _(w, flags, name, o):
    a, b = w.number(o[2]), w.number(o[3])
    unordered = math.isnan(a) or math.isnan(b)
    word = next(f for f in name[1:] if f.rstrip("U") in COMPARE)
    compare = word.rstrip("U")
    result = word != compare if unordered else COMPARE[compare](a, b)
    join = JOIN[next(f for f in name[1:] if f in JOIN)]
    w.set(o[0], join(result, w.predicate(o[4])))
    if o[1] != "PT":
        w.set(o[1], join(not result, w.predicate(o[4])))


@method("FCHK")
def _(w, flags, name, o):
    w.set(o[0], False)


@method("SEL", "FSEL")
def _(w, flags, name, o):
    w.put(o[0], w.value(o[1] if w.predicate(o[3]) else o[2]))


@method("IMNMX", "VIMNMX")
def _(w, flags, name, o):
    read = w.value if "U32" in flags else (lambda t: signed(w.value(t)))
    a, b = read(o[1]), read(o[2])
    w.put(o[0], (min(a, b) if w.predicate(o[3]) else max(a, b)) & MASK)


@method("VIADDMNMX")
def _(w, flags, name, o):
    read = (lambda x: x) if "U32" in flags else signed
    a, b = read((w.value(o[1]) + w.value(o[2])) & MASK), read(w.value(o[3]))
    w.put(o[0], (min(a, b) if w.predicate(o[4]) else max(a, b)) & MASK)


@method("IABS")
def _(w, flags, name, o):
    w.put(o[0], abs(signed(w.value(o[1]))))


@method("PRMT")
def _(w, flags, name, o):
    raw = (w.value(o[1]) | w.value(o[3]) << 32).to_bytes(8, "little")
    selector = w.value(o[2])
    out = 0
    for i in range(4):
        pick = selector >> 4 * i & 15
        byte = raw[pick & 7]
        if pick & 8:
            byte = 0xFF if byte >> 7 else 0
        out |= byte << 8 * i
    w.put(o[0], out)


@method("P2R")
def _(w, flags, name, o):
    packed = sum(w.predicate(f"P{i}") << i for i in range(7))
    mask = w.value(o[3])
    w.put(o[0], w.value(o[2]) & ~mask | packed & mask)


@method("R2P")
def _(w, flags, name, o):
    x, mask = w.value(o[1]), w.value(o[2])
    for i in range(7):
        if mask >> i & 1:
            w.set(f"P{i}", x >> i & 1)


@method("VOTE", "VOTEU")
def _(w, flags, name, o):
    last = w.predicate(o[-1])
    for target in o[:-1]:
        if re.match(r"U?R", target):
            w.put(target, MASK if last else 0)
        elif not target.endswith("PT"):
            w.set(target, last)


@method("SHFL")
def _(w, flags, name, o):
    w.put(o[1], w.value(o[2]))


@method("I2F", "I2FP")
def _(w, flags, name, o):
    if flags & {"U64", "S64"}:
        x = w.pair(o[1])
    else:
        x = w.value(o[1]) if "U32" in flags else signed(w.value(o[1]))
    w.put(o[0], bits(float(x)))


@method("F2I")
def _(w, flags, name, o):
    x = w.number(o[1])
    whole = 0 if math.isnan(x) else int(min(max(x, -(2.0**63)), 2.0**64))
    w.put(o[0], whole, 2 if "U64" in flags else 1)


@method("FADD")
def _(w, flags, name, o):
    w.put(o[0], bits(w.number(o[1]) + w.number(o[2])))


@method("FMUL")
def _(w, flags, name, o):
    w.put(o[0], bits(w.number(o[1]) * w.number(o[2])))


@method("FFMA")
def _(w, flags, name, o):
    w.put(o[0], bits(w.number(o[1]) * w.number(o[2]) + w.number(o[3])))


@method("FMNMX")
def _(w, flags, name, o):
    a, b = w.number(o[1]), w.number(o[2])
    w.put(o[0], bits(min(a, b) if w.predicate(o[3]) else max(a, b)))


@method("MUFU")
def _(w, flags, name, o):
    x = w.number(o[1])
    result = (1 / x if x else math.inf) if "RCP" in flags else 0.0
    w.put(o[0], bits(result))


@method("HFMA2")
def _(w, flags, name, o):
    """Only how it stands for a constant."""
    halves = [struct.unpack("H", struct.pack("e", float(t)))[0] for t in o[-2:]]
    w.put(o[0], halves[0] << 16 | halves[1])
