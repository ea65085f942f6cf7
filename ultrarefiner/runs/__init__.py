"""What a run leaves behind: directories, checkpoints, provenance, tracking."""
