"""Attacks as functions over tensors: what somebody who receives the messages of a run can find out.

    ===================  ============================================================  =====================
    module               question                                                      chance
    ===================  ============================================================  =====================
    ``linkage``          which catalogue item is this uploaded vector?                 1 / N
    ``attribute``        which category has the item of this vector?                   the majority's share
    ``membership``       was this user's sequence among those trained on?              area .5
    ``items``            which items was the client trained on in this round?          area .5
    ===================  ============================================================  =====================

``roc`` measures scores, ``limit`` says what differential privacy allows them at most.
"""

from lightning_sfubm.privacy.attacks.attribute import Attribute, attribute_inference
from lightning_sfubm.privacy.attacks.items import first_layer_shift, logit_shift, random_update, strongest_call
from lightning_sfubm.privacy.attacks.limit import area_limit, rate_limit
from lightning_sfubm.privacy.attacks.linkage import averaged, linkage, linked, nearest_matches, one_to_one_matches
from lightning_sfubm.privacy.attacks.membership import Membership, calibrated_scores, complementary_halves, membership
from lightning_sfubm.privacy.attacks.roc import area_interval, area_under_roc, rate_at

__all__ = [
    "Attribute",
    "Membership",
    "area_interval",
    "area_limit",
    "area_under_roc",
    "attribute_inference",
    "averaged",
    "calibrated_scores",
    "complementary_halves",
    "first_layer_shift",
    "linkage",
    "linked",
    "logit_shift",
    "membership",
    "nearest_matches",
    "one_to_one_matches",
    "random_update",
    "rate_at",
    "rate_limit",
    "strongest_call",
]
