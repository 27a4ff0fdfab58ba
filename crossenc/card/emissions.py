"""What training emitted, measured by codecarbon where that package is installed. Knows no model."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from crossenc.card.data import CrossEncoderModelCardData

logger = logging.getLogger(__name__)


@contextmanager
def measured_emissions(card: CrossEncoderModelCardData) -> Iterator[None]:
    """Record on `card` what the block emits. Without codecarbon, or when it fails, nothing is recorded."""
    tracker = _start()
    try:
        yield
    finally:
        if tracker is not None:
            try:
                tracker.stop()
                card.emissions = describe_emissions(tracker.final_emissions_data)
            except Exception:  # a card must never cost a model
                logger.warning("the emissions of training could not be measured", exc_info=True)


def describe_emissions(measured: Any) -> dict[str, Any]:
    """codecarbon's EmissionsData as a card holds it: grams of CO2, kilowatt hours and the hardware."""
    found = {
        "emissions": float(measured.emissions) * 1000,  # from kilograms, to what the hub expects
        "energy_consumed": float(measured.energy_consumed),
        "source": "codecarbon",
        "training_type": "fine-tuning",
        "on_cloud": measured.on_cloud == "Y",
        "cpu_model": measured.cpu_model,
        "ram_total_size": measured.ram_total_size,
        "hardware_used": measured.gpu_model,
    }
    return {name: value for name, value in found.items() if value is not None}


def _start() -> Any:
    """A running tracker, None where there is none."""
    try:
        from codecarbon import EmissionsTracker
    except ImportError:
        return None
    try:
        tracker = EmissionsTracker(save_to_file=False, log_level="error")
        tracker.start()
    except Exception:  # a card must never cost a model
        logger.warning("codecarbon does not start, so emissions are not measured", exc_info=True)
        return None
    return tracker
