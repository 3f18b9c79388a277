"""The speed switches of the engine section; test_denoisers.py trains with them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import scaled_dot_product_attention, silu

from ds_inpaint.errors import InputError
from ds_inpaint.switches import attention, compile_blocks, require_attention, require_compiler, use_tf32

CPU = torch.device("cpu")


class Block(nn.Module):
    """Called with what requires grad and what does not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 8)

    def forward(self, values: Tensor, shift: Tensor) -> Tensor:
        return values + silu(self.layer(values) + shift)


def test_a_compiled_rollout_runs_the_code_of_the_update():
    """Code without gradients keeps other numbers in bf16: 0.008 lay between them in a very small Flux transformer."""
    graphs = CompileCounter()
    network, plain = nn.Sequential(Block()), Block()
    compile_blocks(network, [f"{__name__}.Block"], backend=graphs)
    values, shift = torch.randn(2, 3, 8)
    with torch.no_grad():
        drawn = network[0](values, shift=shift)
    assert not drawn.requires_grad
    values.requires_grad_()
    found = network[0](values, shift)
    assert graphs.frame_count == 1
    assert torch.equal(found, drawn)
    gradients = torch.autograd.grad(found.sum(), [values, *network.parameters()])
    wanted = torch.autograd.grad(plain(values, shift).sum(), [values, *plain.parameters()])
    torch.testing.assert_close(gradients, wanted)
    torch.testing.assert_close(found, plain(values, shift))
    network[0](values[:2], shift[:2])
    assert graphs.frame_count == 2


def test_only_the_named_blocks_are_compiled():
    network = nn.Sequential(Block(), nn.Linear(2, 2))
    compile_blocks(network, ["torch.nn.modules.linear.Linear"])
    assert "forward" in vars(network[1])
    assert "forward" not in vars(network[0])


def test_a_machine_without_a_compiler_is_told_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "")
    with pytest.raises(InputError, match=r"engine.compile: nothing can be compiled for the CPU: .*\+\+.*in PATH"):
        require_compiler(CPU)


@pytest.mark.parametrize("backend", ["math", "flash"])
def test_attention_is_computed_by_the_kernel_that_is_named(backend):
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 32, 16, generator=draw) for _ in range(3))
    require_attention(backend, torch.float32, CPU)
    with attention(backend), torch.profiler.profile() as profile:
        found = scaled_dot_product_attention(query, key, value)
    called = {event.key for event in profile.key_averages()}
    names = {"math": "aten::_scaled_dot_product_attention_math", "flash": "aten::_scaled_dot_product_flash_attention"}
    assert any(name.startswith(names[backend]) for name in called)
    assert not any(name.startswith(names[other]) for other in names.keys() - {backend} for name in called)
    torch.testing.assert_close(found, (query @ key.mT / 4).softmax(-1) @ value)


def test_a_kernel_that_is_not_there_is_refused():
    with pytest.raises(InputError, match=r"kernel 'cudnn' for this model's heads .* CPUs have flash"):
        require_attention("cudnn", torch.bfloat16, CPU)
    require_attention("auto", torch.bfloat16, CPU)
    with pytest.raises(RuntimeError, match="shapes"), attention("flash"):
        raise RuntimeError("shapes")


def test_tf32_holds_for_matrices_and_convolutions_alike():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    use_tf32(True)
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
    use_tf32(False)
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]
