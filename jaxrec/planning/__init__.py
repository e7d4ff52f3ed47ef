"""Compiling the train step for machines that are not there, and reading what the compiler says."""
