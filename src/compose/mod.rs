//! Text of a Compose file to services and problems, each with its line.
