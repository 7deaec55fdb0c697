"""What a lab sets up before its first round: the certificate authority and the broker's configuration."""
