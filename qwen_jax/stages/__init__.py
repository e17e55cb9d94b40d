"""What is trained: one file per stage."""
