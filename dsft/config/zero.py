"""What a DeepSpeed dict says about ZeRO, for those who relate it to other settings."""

from __future__ import annotations

from typing import Any


def stage(ds: dict[str, Any]) -> int:
    """ZeRO stage, 0 to 3; 0 where the dict does not say."""
    return ds.get("zero_optimization", {}).get("stage", 0)


def offloads_optimizer(ds: dict[str, Any]) -> bool:
    """Whether the optimizer's state and step are on the host or on NVMe."""
    return _device(ds, "offload_optimizer") != "none"


def offloads_parameters(ds: dict[str, Any]) -> bool:
    """Whether the weights are kept on the host or on NVMe between uses."""
    return _device(ds, "offload_param") != "none"


def _device(ds: dict[str, Any], block: str) -> str:
    return ds.get("zero_optimization", {}).get(block, {}).get("device", "none")
