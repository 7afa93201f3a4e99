"""The optimizer of a learner."""

from torch import nn
from torch.optim import AdamW

ADAM_BETAS = (0.9, 0.95)
"""A second moment over 20 steps: RL runs are short and their gradients change quickly."""

ADAM_EPSILON = 1e-8


def make_optimizer(model: nn.Module, *, learning_rate: float, weight_decay: float) -> AdamW:
    """Return AdamW over the parameters that train, all with the same settings.

    Args:
        model: The model, sharded or not.
        learning_rate: Constant learning rate.
        weight_decay: Decoupled weight decay.
    """
    return AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=learning_rate,
        betas=ADAM_BETAS,
        eps=ADAM_EPSILON,
        weight_decay=weight_decay,
        # One pass over the weights instead of one per operation; the only choice that is fast on
        # CPU.
        fused=True,
    )
