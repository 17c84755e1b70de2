"""Normalization layers, each called with the number of channels it normalizes.

Those that torch has with channels first (``BatchNorm2d``, ``InstanceNorm2d``, ``Identity``) are
named in ``conf/norm`` directly. All take and return N,C,H,W
tensors. A layer that brings its activation has a true ``apply_act``: networks then leave out the
ReLU behind it.
"""

from gnbench.norms.activating import evonorm_b0, evonorm_s0, filter_response_norm
from gnbench.norms.batch import BatchGroupNorm, BatchRenorm, SyncBatchNorm, batch_group_norm
from gnbench.norms.group import GroupNorm, ReferenceGroupNorm, group_norm
from gnbench.norms.pixel import (
    ChannelLayerNorm,
    ChannelRMSNorm,
    DynamicTanh,
    LocalResponseNorm,
)
from gnbench.norms.precision import imprecise_statistics
from gnbench.norms.weights import standardize_weights

__all__ = [
    "BatchGroupNorm",
    "BatchRenorm",
    "ChannelLayerNorm",
    "ChannelRMSNorm",
    "DynamicTanh",
    "GroupNorm",
    "LocalResponseNorm",
    "ReferenceGroupNorm",
    "SyncBatchNorm",
    "batch_group_norm",
    "evonorm_b0",
    "evonorm_s0",
    "filter_response_norm",
    "group_norm",
    "imprecise_statistics",
    "standardize_weights",
]
