"""The embedded model: Show-o2's architecture, small, trained by us on procedural scenes, shipped with the package."""
