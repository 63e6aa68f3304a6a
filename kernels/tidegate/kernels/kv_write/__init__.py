"""What happens to query, key and value before attention: norm, clip, rotation, the cache write."""
