"""Models from a hub or a URL: choice of files, downloads that continue, and the cache, through `huggingface_hub`."""
