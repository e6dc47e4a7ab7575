"""What compare says of models of each kind."""
