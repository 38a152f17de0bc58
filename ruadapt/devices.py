"""What the device computes fast."""

import torch


def bfloat16_is_native() -> bool:
    """Whether the device multiplies bfloat16 in hardware; elsewhere it would only cost time."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
