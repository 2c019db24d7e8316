"""Which instruction set the kernels are compiled for: the best that this CPU has, or what ``PYMISTRAL_ISA`` asks for."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from functools import lru_cache

from .host import current_host


@dataclass(frozen=True)
class Isa:
    """A target for the kernel compiler.

    Attributes
    ----------
    name
        ``amx``, ``avx512vnni``, ``avxvnni``, ``avx2``, ``neon`` or ``generic``.
    cpu, features
        What LLVM is told.
    has_vnni
        uint8 by int8 dot products in one instruction, without saturation.
    has_f16
        Conversion between half and single floats in hardware.
    has_bf16
        Dot products of bfloat16 pairs in hardware, which take less time than what stands in for them.
    tokens
        Tokens that a matrix kernel keeps in registers.
    has_sdot, has_usdot
        AArch64: dot products of int8 by int8 (``dotprod``), and of uint8 by int8 (``i8mm``).
    adds_beside
        Additions go through pipes of their own beside products, and not through those that multiply: what `winograd` is for.
    two_pipes
        All instructions on vectors of 512 bits go through the same two pipes, conversions as well (Intel's).
    far_cache
        A core reads some 15 GB/s from behind its second-level cache, less than products of 8 tokens take (Intel's servers).
    """

    name: str
    cpu: str
    features: str
    has_vnni: bool
    has_f16: bool
    has_bf16: bool
    tokens: int
    has_sdot: bool = False
    has_usdot: bool = False
    adds_beside: bool = False
    two_pipes: bool = False
    far_cache: bool = False

    @property
    def has_avx512(self) -> bool:
        """Vectors of 512 bits."""
        return self.name in ("amx", "avx512vnni")

    @property
    def pairs_scales(self) -> bool:
        """Whether weights lie in formats in pairs (see `tiles`) where there is one."""
        return self.name == "avx512vnni"

    @property
    def has_amx(self) -> bool:
        """Products of whole tiles of bfloat16 in one instruction."""
        return self.name == "amx"


_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni", "avx2", "fma", "f16c")
_NEEDS = {
    "amx": (*_AVX512, "avx512bf16", "amx-tile", "amx-bf16"),
    "avx512vnni": _AVX512,
    "avxvnni": ("avxvnni", "avx2", "fma", "f16c"),
    "avx2": ("avx2", "fma", "f16c"),
    "generic": (),
}
_TOKENS = {"amx": 8, "avx512vnni": 8, "avxvnni": 4, "avx2": 6, "generic": 4}
_INTEL_SERVERS = ("cascadelake", "cooperlake", "icelake-server")  # with VNNI, beside those whose names end with "rapids"
_INTEL_CLIENTS = ("icelake-client", "tigerlake", "rocketlake")
_HASWELL = ("avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "popcnt", "sse3", "sse4.1", "sse4.2", "ssse3", "cx16")


def _may_use_amx() -> bool:
    """Ask Linux for the tile registers, as every process that uses them has to: they make the state that it saves 8 KB larger.

    See Documentation/arch/x86/xstate.rst of the kernel: ``arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)``.
    """
    if not sys.platform.startswith("linux"):
        return False
    sys_arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata = 158, 0x1023, 18
    return bool(ctypes.CDLL(None).syscall(sys_arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata) == 0)


@lru_cache(maxsize=1)
def current_isa() -> Isa:
    """The instruction set in use. Raises ValueError if ``PYMISTRAL_ISA`` names one that is unknown or that this CPU lacks."""
    machine = current_host()
    host, triple = machine.present, machine.triple
    forced = os.environ.get("PYMISTRAL_ISA", "").strip().lower()
    if triple.startswith(("aarch64", "arm64")):
        if forced not in ("", "neon", "generic"):
            raise ValueError(f"PYMISTRAL_ISA={forced!r}: this CPU offers neon and generic")
        fast = forced != "generic"
        return Isa(
            forced or "neon",
            machine.cpu,
            machine.features,
            has_vnni=False,
            has_f16=True,
            has_bf16=False,
            tokens=4,
            has_sdot=fast and "dotprod" in host,
            has_usdot=fast and "i8mm" in host,
        )
    available = [name for name, needs in _NEEDS.items() if host.issuperset(needs) and (needs == () or "64" in triple)]
    if "amx" in available and forced in ("", "amx") and not _may_use_amx():
        available.remove("amx")
    if forced and forced not in available:
        raise ValueError(f"PYMISTRAL_ISA={forced!r}: this CPU offers {', '.join(available)}")
    name = forced or available[0]
    tokens = _TOKENS[name]
    if name in ("amx", "avx512vnni"):
        adds_beside = name == "avx512vnni" and machine.cpu == "znver4"
        # Without AMX, Intel's (Sapphire Rapids and later) make 16 such products in a cycle, 32 of floats and 64 of int16.
        has_bf16 = "avx512bf16" in host and not (name == "avx512vnni" and "rapids" in machine.cpu)
        servers = "rapids" in machine.cpu or machine.cpu in _INTEL_SERVERS
        common = (name, machine.cpu, machine.features, True, True, has_bf16, tokens)
        return Isa(*common, adds_beside=adds_beside, two_pipes=servers or machine.cpu in _INTEL_CLIENTS, far_cache=servers)
    if name == "avxvnni":
        return Isa(name, "haswell", ",".join(f"+{feature}" for feature in (*_HASWELL, "avxvnni")), True, True, False, tokens)
    if name == "avx2":
        return Isa(name, "haswell", ",".join(f"+{feature}" for feature in _HASWELL), False, True, False, tokens)
    return Isa(name, "x86-64" if "x86_64" in triple else "generic", "", False, False, False, tokens)
