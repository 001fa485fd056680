"""What a model writes to what clients read: typed events, whatever the endpoint that sends them."""
