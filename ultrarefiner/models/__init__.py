"""The networks: the coarse one, the Segment Anything families, and the cascade of both."""
