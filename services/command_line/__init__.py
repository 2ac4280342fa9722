"""`cotune`: what a person types. Talks HTTP to the API; starts the services as processes, never imports them."""
