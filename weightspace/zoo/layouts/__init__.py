"""Readers and writers of the folders in which others keep their networks, one file each."""
