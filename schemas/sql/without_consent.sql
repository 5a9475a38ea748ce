-- Which of these people are not personalised. $1: a JSON array of ids; $2: what holds for who has said nothing.
BEGIN
    RETURN QUERY SELECT p.user_id FROM jsonb_array_elements_text($1) AS p (user_id)
    LEFT JOIN consents AS c ON c.user_id = p.user_id WHERE NOT coalesce(c.personalise, $2);
END
