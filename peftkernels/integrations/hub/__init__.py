"""The Hugging Face Hub: ``python -m peftkernels.integrations.hub FOLDER`` writes the package in its kernels' layout."""

from peftkernels.integrations.hub.folder import assemble

__all__ = ["assemble"]
