"""What people touch: the client SDK and the command line."""
