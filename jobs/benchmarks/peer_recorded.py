"""Our side of `seedloom benchmark peer`: text-to-image, and a line for every batch that was made."""

from __future__ import annotations

import json
import os
import time

from stages.contract import DUMMY, Backbone, Generated, Models, Order
from stages.generate.text_to_image import TextToImage


class Recorded(TextToImage):
    """The same images; the benchmark learns when they were made, and whether again."""

    class Config(TextToImage.Config):
        method: str  # type: ignore[assignment]

    def __call__(self, backbone: Backbone, models: Models, order: Order) -> Generated:
        made = super().__call__(backbone, models, order)
        keys = [f"{order.target}-{chance.index:06d}" for chance in order.chances if chance != DUMMY]
        with open(os.environ["SEEDLOOM_PEER_LOG"], "a") as log:
            log.write(json.dumps([time.time(), keys]) + "\n")
        return made
