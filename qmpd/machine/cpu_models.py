"""The models of processors: names, and no processor behind any of them.

A domain of libvirt's has one of them in its description, written there by libvirt
itself when the domain was made for QEMU, and libvirt starts no domain whose model
the emulator does not know.  ``qemu64`` is what QEMU has if none is asked for.
``max``, which means all that there is, makes the modes ``maximum`` and ``host-model``
work: libvirt 11.3 asks what it has before it is asked for anything, and crashes when
it starts a domain of the mode ``host-model`` without an answer.

They have no properties, so that features that are switched on or off with a model
are accepted and make no difference.
"""

from __future__ import annotations

from typing import Any, Final

from qmpd.errors import Error

#: The models that clients are told of.
MODELS: Final = ("max", "qemu64")

_NAMES: Final = """
    486 athlon base core2duo coreduo kvm32 kvm64 max n270 pentium pentium2 pentium3 phenom qemu32 qemu64
    Broadwell Broadwell-IBRS Broadwell-noTSX Broadwell-noTSX-IBRS Cascadelake-Server
    Cascadelake-Server-noTSX ClearwaterForest Conroe Cooperlake Denverton Dhyana EPYC EPYC-Genoa EPYC-IBPB
    EPYC-Milan EPYC-Rome GraniteRapids Haswell Haswell-IBRS Haswell-noTSX Haswell-noTSX-IBRS Icelake-Server
    Icelake-Server-noTSX IvyBridge IvyBridge-IBRS KnightsMill Nehalem Nehalem-IBRS Opteron_G1 Opteron_G2
    Opteron_G3 Opteron_G4 Opteron_G5 Penryn SandyBridge SandyBridge-IBRS SapphireRapids SierraForest
    Skylake-Client Skylake-Client-IBRS Skylake-Client-noTSX-IBRS Skylake-Server Skylake-Server-IBRS
    Skylake-Server-noTSX-IBRS Snowridge Westmere Westmere-IBRS YongFeng
"""
#: What ``-cpu`` takes: all models of QEMU's, without their versions.
NAMES: Final = frozenset(_NAMES.split())

#: What `query-cpu-model-expansion` calls a model that never changes.
_STATIC: Final = "base"


def definitions() -> list[dict[str, Any]]:
    """What `query-cpu-definitions` answers (CpuDefinitionInfo)."""
    return [
        {
            "name": name,
            "typename": f"{name}-x86_64-cpu",
            "unavailable-features": [],
            "static": False,
            "migration-safe": name != "max",
            "deprecated": False,
        }
        for name in MODELS
    ]


def expansion(kind: str, model: dict[str, Any]) -> dict[str, Any]:
    """What `query-cpu-model-expansion` answers (CpuModelExpansionInfo): that there is nothing.

    :param kind: CpuModelExpansionType.
    :param model: CpuModelInfo.
    :raise Error: if there is no such model, or it is not described by an object.
    """
    if not isinstance(model.get("props", {}), dict):
        raise Error("Invalid parameter type for 'model.props', expected: object")
    name = model["name"]
    if name not in MODELS:
        raise Error(f"CPU model '{name}' not found")
    return {"model": {"name": _STATIC if kind == "static" else name, "props": {}}}
