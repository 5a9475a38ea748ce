-- Neighbours by text, nearest first; the anchor itself is left out.
SELECT v.item_id, i.title, 1 - (v.vector <=> {query}) AS score
FROM text_vectors AS v JOIN items AS i ON i.item_id = v.item_id
WHERE {allowed}
ORDER BY v.vector <=> {query}, v.item_id LIMIT %(k)s
