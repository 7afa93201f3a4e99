"""The optimizer of SFT and RL."""

from torch import nn
from torch.optim import AdamW

ADAM_BETAS = (0.9, 0.95)
"""The second-moment horizon of 20 steps suits runs of tens to thousands of steps."""

ADAM_EPSILON = 1e-8


def make_optimizer(model: nn.Module, *, learning_rate: float, weight_decay: float) -> AdamW:
    """Return AdamW over the parameters that train, all with the same settings.

    Args:
        model: The model, sharded or not.
        learning_rate: Learning rate; a schedule may set another one before each step.
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
