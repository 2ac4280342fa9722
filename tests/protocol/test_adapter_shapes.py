from protocol.adapter_shapes import tensors_at_rank
from protocol.safetensors_header import TensorInfo


def test_only_the_rank_of_each_factor_changes() -> None:
    tensors = {
        "q.lora_A.weight": TensorInfo("F32", (8, 16)),
        "q.lora_B.weight": TensorInfo("F32", (32, 8)),
        "scale": TensorInfo("F32", (8,)),
    }
    resized = tensors_at_rank(tensors, 3)
    assert {name: info.shape for name, info in resized.items()} == {
        "q.lora_A.weight": (3, 16),
        "q.lora_B.weight": (32, 3),
        "scale": (8,),
    }
    assert {info.dtype for info in resized.values()} == {"F32"}
    assert tensors_at_rank(resized, 8) == tensors
