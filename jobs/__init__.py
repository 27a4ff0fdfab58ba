"""What `ray job submit` and the `crossenc` command run."""
