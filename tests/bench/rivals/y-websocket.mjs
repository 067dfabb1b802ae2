// The server of y-websocket; YPERSISTENCE names the folder of its LevelDB: node y-websocket.mjs PORT
import http from 'node:http'
import { setupWSConnection } from '@y/websocket-server/utils'
import ws from 'ws'

const server = http.createServer()
new ws.Server({ server }).on('connection', setupWSConnection)
server.listen(Number(process.argv[2]), '127.0.0.1')
