"""Ways out of the block graph: protocols under which others use its nodes."""
