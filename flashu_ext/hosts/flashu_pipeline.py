"""What diffusers' `custom_pipeline` takes: it copies this file into its cache and looks for the one pipeline class in it."""

from flashu_ext.hosts.diffusers import FlashuPipeline

__all__ = ["FlashuPipeline"]
