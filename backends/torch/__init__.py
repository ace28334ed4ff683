"""The PyTorch backend: any torch device (cuda, cpu, mps, xpu, npu with torch_npu)."""
