"""What meets other people's files and machines: read only by who needs it. See README.md."""
