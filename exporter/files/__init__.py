"""Files that others may have written, and files of ours that nobody may see half written.

Standard library only. `text_file` reads text and JSON, `whole_file` writes one file,
`private_folder` is where a run works, `replacing` puts a folder in another's place, `user_cache` is
where caches lie.
"""
