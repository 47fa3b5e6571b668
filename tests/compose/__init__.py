"""The swarm of docker-compose.yml on a real engine: `make test-compose`. Not collected by pytest: it takes minutes."""
