-- Whether a person has answered in the week of an instant, or asked to be forgotten: who did is not asked again.
SELECT EXISTS (
    SELECT FROM survey_answers
    WHERE user_id = %(user_id)s AND answered_at >= date_trunc('week', %(at)s::timestamptz, 'UTC')
) OR EXISTS (SELECT FROM erasure_requests WHERE user_id = %(user_id)s)
