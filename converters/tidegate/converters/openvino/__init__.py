"""The walk as OpenVINO graphs, paged from the start."""
