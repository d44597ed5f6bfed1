"""What pruning has cost in quality: the pruned model against the dense one, image by image."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@torch.inference_mode()
def logits(model: nn.Module, batches: list[Tensor]) -> Tensor:
    """[images, classes]."""
    return torch.cat([model(batch) for batch in batches])


def compare(dense_BK: Tensor, pruned_BK: Tensor, labels_B: Tensor) -> dict[str, float]:
    """Top-1 of both, their ratio, standard errors paired per image, and KL(dense || pruned) in nats.

    `top1_difference_se` is that of the mean of (pruned right - dense right); `top1_ratio_se` follows
    from it to first order, with the dense accuracy varying too.
    """
    right_dense = (dense_BK.argmax(1) == labels_B).double()
    right = (pruned_BK.argmax(1) == labels_B).double()
    top1, top1_dense = right.mean().item(), right_dense.mean().item()
    ratio, root_n = top1 / top1_dense, len(labels_B) ** 0.5
    kl = F.kl_div(
        pruned_BK.log_softmax(1), dense_BK.log_softmax(1), log_target=True, reduction="batchmean"
    )
    return {
        "top1": top1,
        "top1_dense": top1_dense,
        "top1_ratio": ratio,
        "top1_difference_se": ((right - right_dense).std() / root_n).item(),
        "top1_ratio_se": ((right - ratio * right_dense).std() / root_n).item() / top1_dense,
        "kl_to_dense": kl.item(),
        "test_images": len(labels_B),
    }


def difference(
    dense_BK: Tensor, ours_BK: Tensor, theirs_BK: Tensor, labels_B: Tensor
) -> dict[str, float]:
    """Top-1 of theirs less that of ours, by the dense top-1, with its standard error paired per image."""
    right_dense, ours, theirs = (
        (logits_BK.argmax(1) == labels_B).double() for logits_BK in (dense_BK, ours_BK, theirs_BK)
    )
    top1_dense = right_dense.mean()
    lead_B = theirs - ours
    value = lead_B.mean() / top1_dense
    spread = (lead_B - value * right_dense).std() / len(lead_B) ** 0.5 / top1_dense
    return {"value": value.item(), "se": spread.item()}
