"""The gates of a mixture of experts: checked when it is planned, computed when it is made.

torch and transformers are imported only if there are gates to compute.
"""

from __future__ import annotations

from streammerge.events import Control
from streammerge.planning.plan import MergePlan


def check_gates(plan: MergePlan) -> None:
    """Refuse a plan whose gates cannot be computed.

    Raises
    ------
    InputError
        If transformers, the tokenizer, a prompt or the memory does not allow it.
    """
    if plan.gates is not None:
        from streammerge.estimate.gates.compute import prepare_gates

        prepare_gates(plan)


def supply_gates(plan: MergePlan, control: Control) -> None:
    """Compute the gates of a plan, if it has any.

    Raises
    ------
    StreammergeError
        See `streammerge.errors`.
    """
    if plan.gates is not None:
        from streammerge.estimate.gates.compute import compute_gates

        compute_gates(plan, control)
